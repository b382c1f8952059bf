"""A labelled toy stream for the examples beside this file.

One conversation in four counts upwards, the others are noise. The model is to count, so a good curriculum
trains on the source `counting`; only the target's examples say so.
"""

import argparse
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import curriq

BATCH = 16
SOURCES = ("counting", "noise")
WORDS = ["<pad>", "<eos>", "user", "assistant", "count", "from", *map(str, range(200))]
IDS = {word: number for number, word in enumerate(WORDS)}


def conversation(draw: random.Random, source: str) -> dict[str, Any]:
    """A question and its answer, of any length."""
    start, length = draw.randrange(20), draw.randint(4, 9)
    answer = range(start, start + length) if source == "counting" else draw.choices(range(200), k=length)
    question = {"role": "user", "content": f"count from {start}"}
    return {
        "messages": [question, {"role": "assistant", "content": " ".join(map(str, answer))}],
        "source": source,
    }


def conversations(seed: int = 0) -> Iterator[dict[str, Any]]:
    """The stream, without end."""
    draw = random.Random(seed)
    while True:
        yield conversation(draw, "counting" if draw.random() < 0.25 else "noise")


def encode(chat: dict[str, Any]) -> dict[str, Any]:
    """Tokens and labels; only what the assistant says is learnt."""
    question, answer = (message["content"].split() for message in chat["messages"])
    prompt = [IDS[word] for word in ("user", *question, "assistant")]
    learnt = [IDS[word] for word in (*answer, "<eos>")]
    return {"input_ids": prompt + learnt, "labels": [-100] * len(prompt) + learnt, "source": chat["source"]}


def stream(seed: int = 0) -> Iterator[dict[str, Any]]:
    return map(encode, conversations(seed))


def clean(n: int, seed: int) -> list[dict[str, Any]]:
    """Conversations of the target alone, none of them from the stream."""
    draw = random.Random(f"clean {seed}")
    return [conversation(draw, "counting") for _ in range(n)]


def model(seed: int = 0) -> PreTrainedModel:
    """A Llama of 140,000 parameters, not trained."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", vocab_size=len(WORDS), **sizes, **special)
    )


class Everything:
    """The policy that accepts the stream as it is: training without a curriculum, in the same code."""

    def accept_prob(self, offer: Any) -> torch.Tensor:
        return torch.ones(len(offer))


def trainer_arguments(steps: int, seed: int, folder: Path | None) -> dict[str, Any]:
    """What the examples with a `Trainer` set alike: on the CPU, with a checkpoint at the end."""
    return {
        "output_dir": str(folder or tempfile.gettempdir()),
        "max_steps": steps,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps" if folder else "no",
        "save_steps": steps,
        "logging_steps": 50,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "seed": seed,
    }


@torch.no_grad()
def held_out_loss(model: torch.nn.Module) -> float:
    """Of conversations that count, nats per token."""
    batch = curriq.pad_examples([encode(chat) for chat in clean(128, seed=1)])
    device = next(model.parameters()).device
    test = {name: column.to(device) for name, column in batch.items()}
    return curriq.example_losses(model.eval(), test).mean().item()


def arguments(steps: int = 120) -> argparse.Namespace:
    """The command line of every example."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps, of 16 examples each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--uniform", action="store_true", help="train only without the curriculum")
    parser.add_argument("--folder", type=Path, help="where the run with the curriculum is saved")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --folder")
    return parser.parse_args()


def main(train: Callable[..., torch.nn.Module]) -> None:
    """Print the held-out loss with the curriculum and without, at equally many examples."""
    args = arguments()
    if not args.uniform:
        trained = train(args.steps, seed=args.seed, folder=args.folder, resume=args.resume)
        report("with the curriculum", args.steps, held_out_loss(trained))
    trained = train(args.steps, seed=args.seed, uniform=True)
    report("without", args.steps, held_out_loss(trained))


def report(name: str, steps: int, loss: float) -> None:
    print(f"{name + ':':26}held-out loss {loss:.3f} after {steps * BATCH} examples", flush=True)
