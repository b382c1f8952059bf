"""Only the selected stream: a file of the examples that a policy of one's own accepts, for any trainer.

    python examples/clients/stream_only.py
    python examples/clients/stream_only.py --steps 60 --folder runs/stream
    python examples/clients/stream_only.py --steps 120 --folder runs/stream --resume

No model takes part in the selection. For the learned policy train a small model on the batches as they are
written, and give it to `observe`, as plain_loop.py does.
"""

import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import toy

import curriq


class TargetLike:
    """Accepts what is more like the target than the average of the stream."""

    def accept_prob(self, offer: Any) -> torch.Tensor:
        return (offer.known["static_score"] > 0.5).float()


def write(path: Path, steps: int, policy: Any, seed: int, resume: bool) -> None:
    """Write so many batches of selected examples, one a line; a resume appends to them."""
    target = [toy.encode(chat) for chat in toy.clean(64, seed=0)]
    curriculum = curriq.Curriculum(
        target, sources=toy.SOURCES, batch_size=toy.BATCH, policy=policy, seed=seed
    )
    saved = path.with_suffix(".pt")
    if resume:
        curriculum.load_state_dict(torch.load(saved, weights_only=True))
    selected = curriculum.select(toy.stream(seed))
    with path.open("a" if resume else "w") as file:
        while curriculum.step < steps:
            file.writelines(json.dumps(example) + "\n" for example in islice(selected, toy.BATCH))
            curriculum.observe()
    torch.save(curriculum.state_dict(), saved)


def train(
    steps: int, *, seed: int = 0, uniform: bool = False, folder: Path | None = None, resume: bool = False
) -> torch.nn.Module:
    path = (folder or Path(tempfile.mkdtemp())) / "selected.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, steps, toy.Everything() if uniform else TargetLike(), seed, resume)
    examples = [json.loads(line) for line in path.read_text().splitlines()]
    model = toy.model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for start in range(0, len(examples), toy.BATCH):
        batch = curriq.pad_examples(examples[start : start + toy.BATCH])
        curriq.example_losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    toy.main(train)
