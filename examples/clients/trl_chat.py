"""A curriculum in TRL's `SFTTrainer`, on chats with a chat template; only what the assistant says is learnt.

python examples/clients/trl_chat.py
python examples/clients/trl_chat.py --steps 60 --folder runs/chat
python examples/clients/trl_chat.py --steps 120 --folder runs/chat --resume
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import toy
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import curriq
from curriq.integrations.transformers import CurriculumCallback, SelectedDataset

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}user {{ message.content }} {% else %}"
    "assistant {% generation %}{{ message.content }} <eos>{% endgeneration %}{% endif %}{% endfor %}"
)
"""What stands between the generation tags is what the assistant says."""


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel(toy.IDS, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE
    )


def tokenized(tokenizer: PreTrainedTokenizerFast, chat: dict[str, Any]) -> dict[str, Any]:
    """The chat in the template's tokens; −100 where the assistant does not speak."""
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    encoded = tokenizer.apply_chat_template(chat["messages"], **options)
    masked = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    labels = [token if spoken else -100 for token, spoken in masked]
    return {"input_ids": encoded["input_ids"], "labels": labels, "source": chat["source"]}


def train(
    steps: int, *, seed: int = 0, uniform: bool = False, folder: Path | None = None, resume: bool = False
) -> torch.nn.Module:
    encode = partial(tokenized, tokenizer())

    def stream() -> Iterator[dict[str, Any]]:
        return map(encode, toy.conversations(seed))

    curriculum = curriq.Curriculum(
        [encode(chat) for chat in toy.clean(64, seed=0)],
        sources=toy.SOURCES,
        batch_size=toy.BATCH,
        reward_every=4,
        seed=seed,
        policy=toy.Everything() if uniform else None,
    )
    trainer = SFTTrainer(
        model=toy.model(seed),
        args=SFTConfig(
            per_device_train_batch_size=toy.BATCH,
            dataset_kwargs={"skip_prepare_dataset": True},  # the examples are tokens already
            **toy.trainer_arguments(steps, seed, folder),
        ),
        train_dataset=SelectedDataset(curriculum, stream).for_trl(),
        data_collator=curriq.pad_examples,
        processing_class=tokenizer(),
    )
    trainer.add_callback(CurriculumCallback(curriculum, trainer))
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


if __name__ == "__main__":
    toy.main(train)
