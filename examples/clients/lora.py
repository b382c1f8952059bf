"""A curriculum for LoRA adapters (PEFT) on a frozen model; the adapters are saved as PEFT saves them.

python examples/clients/lora.py
python examples/clients/lora.py --steps 60 --folder runs/lora
python examples/clients/lora.py --steps 120 --folder runs/lora --resume
"""

from pathlib import Path

import plain_loop
import torch
import toy
from peft import LoraConfig, PeftModel, get_peft_model

import curriq


def base(seed: int) -> torch.nn.Module:
    """What is adapted: a model that has seen a little of the stream."""
    return plain_loop.train(40, seed=seed, uniform=True)


def train(
    steps: int, *, seed: int = 0, uniform: bool = False, folder: Path | None = None, resume: bool = False
) -> torch.nn.Module:
    curriculum = curriq.Curriculum(
        [toy.encode(chat) for chat in toy.clean(64, seed=0)],
        sources=toy.SOURCES,
        batch_size=toy.BATCH,
        reward_every=4,
        seed=seed,
        policy=toy.Everything() if uniform else None,
    )
    if resume:
        model = PeftModel.from_pretrained(base(seed), folder, is_trainable=True)
    else:
        torch.manual_seed(seed)
        settings = LoraConfig(r=8, target_modules=r".*(_proj|lm_head)", task_type="CAUSAL_LM")
        model = get_peft_model(base(seed), settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if resume:
        state = torch.load(folder / "state.pt", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        curriculum.load_state_dict(state["curriculum"])
    examples = curriculum.select(toy.stream(seed + 1))
    while curriculum.step < steps:
        batch = curriq.pad_examples([next(examples) for _ in range(toy.BATCH)])
        model.train()
        curriq.example_losses(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        curriculum.observe(model, optimizer)
    if folder is not None:
        model.save_pretrained(folder, save_embedding_layers=False)  # the base model has them
        state = {"optimizer": optimizer.state_dict(), "curriculum": curriculum.state_dict()}
        torch.save(state, folder / "state.pt")
    return model


if __name__ == "__main__":
    toy.main(train)
