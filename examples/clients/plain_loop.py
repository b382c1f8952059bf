"""A curriculum in a PyTorch loop of one's own.

python examples/clients/plain_loop.py
python examples/clients/plain_loop.py --steps 60 --folder runs/plain
python examples/clients/plain_loop.py --steps 120 --folder runs/plain --resume
"""

from pathlib import Path
from typing import Any

import torch
import toy
from torch.utils.data import DataLoader

import curriq


def train(
    steps: int,
    *,
    seed: int = 0,
    uniform: bool = False,
    folder: Path | None = None,
    resume: bool = False,
    policy: Any = None,
) -> torch.nn.Module:
    model = toy.model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    curriculum = curriq.Curriculum(
        [toy.encode(chat) for chat in toy.clean(64, seed=0)],
        sources=toy.SOURCES,
        batch_size=toy.BATCH,
        reward_every=4,
        policy=toy.Everything() if uniform else policy,
        seed=seed,
    )
    if resume:
        state = torch.load(folder / "state.pt", weights_only=True)
        for part, name in ((model, "model"), (optimizer, "optimizer"), (curriculum, "curriculum")):
            part.load_state_dict(state[name])
    examples = curriculum.select(toy.stream(seed))
    loader = DataLoader(examples, batch_size=toy.BATCH, collate_fn=curriq.pad_examples)
    for _, batch in zip(range(curriculum.step, steps), loader, strict=False):
        model.train()
        curriq.example_losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        curriculum.observe(model, optimizer)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        parts = {"model": model, "optimizer": optimizer, "curriculum": curriculum}
        torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "state.pt")
    return model


if __name__ == "__main__":
    toy.main(train)
