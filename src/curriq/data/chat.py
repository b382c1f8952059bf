"""Conversations: reading them from rows, and their tokens with the assistant's marked as those to learn."""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from curriq.data.documents import Message, shorten, valid_text
from curriq.errors import CurriqError

if TYPE_CHECKING:
    import transformers

_log = logging.getLogger("curriq")

DEFAULT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Phi-3's format, for a tokenizer without a chat template. Its marks are ordinary text: no new tokens."""
MOST_TURNS = 2000
"""Turns of a conversation whose template has no tags; 2000 take some seconds, ten times as many minutes."""


def read_conversation(value: Any) -> tuple[Message, ...] | None:
    """The messages that a column holds, without empty fields; None when the value is not a conversation: a
    list of objects with a string as `role` and, where there is one, as `content`."""
    if not isinstance(value, list):
        return None
    try:  # `datasets` gives objects whose keys differ as JSON
        messages = [json.loads(item) if isinstance(item, str) else item for item in value]
    except (ValueError, RecursionError):
        return None
    for item in messages:
        if not isinstance(item, dict) or {type(item.get("role")), type(item.get("content") or "")} != {str}:
            return None
    return tuple(
        {k: valid_text(v) if isinstance(v, str) else v for k, v in item.items() if v is not None}
        for item in messages
    )


def render_plain(messages: Sequence[Message]) -> str:
    """Lines of `role: content`, the text of a conversation's document; empty when no message has content."""
    turns = [(message["role"], message.get("content", "")) for message in messages]
    return "\n".join(map(": ".join, turns)) if any(text.strip() for _, text in turns) else ""


def encode_chat(
    tokenizer: "transformers.PreTrainedTokenizerBase", messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation by the tokenizer's chat template, and which of them are learnt.

    Learnt are the tokens inside {% generation %} tags or, in a template without tags, those that an assistant
    turn adds to the prompt for it. A token that straddles the border is learnt.

    Raises:
        CurriqError: the tokenizer is a slow one, or the template cannot render the conversation, or has no
            tags and renders turns differently once later ones follow.
    """
    if not tokenizer.is_fast:
        raise CurriqError(
            "chat data needs a fast tokenizer, one with tokenizer.json, which the tokenizer "
            f"{_name(tokenizer)} is not."
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = DEFAULT_TEMPLATE
        _log.warning(
            f"the tokenizer {_name(tokenizer)} has no chat_template: conversations are written in Phi-3's "
            "format."
        )
    text, spans = _render(tokenizer, messages)
    learnt = bytearray(len(text))
    for start, stop in _added_by_turns(tokenizer, messages, text) if spans is None else spans:
        learnt[start:stop] = b"\1" * (stop - start)
    # Not the mask of apply_chat_template: where a span begins or ends in white space that the tokenizer
    # drops, it omits the turn or runs on into the user's (transformers 5.23).
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # With `trim_offsets`, the range of a token of white space is empty and lies at the token's end.
    ranges = ((min(first, last - 1), last) for first, last in encoded["offset_mapping"])
    return encoded["input_ids"], [1 in learnt[first:last] for first, last in ranges]


def _name(tokenizer: Any) -> str:
    return repr(tokenizer.name_or_path) if tokenizer.name_or_path else "of this run"


def _added_by_turns(tokenizer: Any, messages: Sequence[Message], whole: str) -> Iterator[tuple[int, int]]:
    """Range of characters that each assistant turn adds to the prompt for it."""
    if len(messages) > MOST_TURNS:
        raise CurriqError(
            f"{shorten(messages)} has {len(messages)} turns, and the chat template of the tokenizer "
            f"{_name(tokenizer)} no {{% generation %}} tags, so each turn is rendered with all before it: at "
            f"most {MOST_TURNS} turns can be. Cut the conversation, or use a template with tags."
        )
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt, _ = _render(tokenizer, messages[:i], prompt=True)
            turn, _ = _render(tokenizer, messages[: i + 1])
            if not (whole.startswith(turn) and turn.startswith(prompt)):
                raise CurriqError(
                    f"the chat template of the tokenizer {_name(tokenizer)} changes turn {i + 1} of "
                    f"{shorten(messages)} once later turns follow. Use a template with {{% generation %}} "
                    "tags around the assistant's text."
                )
            yield len(prompt), len(turn)


def _render(tokenizer: Any, messages: Sequence[Message], *, prompt: bool = False) -> tuple[str, Any]:
    """The rendered conversation, and the ranges of characters in {% generation %} tags, None without tags."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        template = tokenizer.get_chat_template()
        has_tags = re.search(r"\{%-?\s*generation\b", template) is not None
        options: dict[str, Any] = {"chat_template": template, "add_generation_prompt": prompt}
        options |= {"return_assistant_tokens_mask": has_tags, **tokenizer.special_tokens_map}
        texts, spans = render_jinja_template([list(messages)], **options)
    except Exception as error:  # a template may raise anything
        raise CurriqError(
            f"the chat template of the tokenizer {_name(tokenizer)} cannot render {shorten(messages)}: "
            f"{error!r}. Fix or remove the row, or use another template."
        ) from error
    return texts[0], spans[0] if has_tags else None
