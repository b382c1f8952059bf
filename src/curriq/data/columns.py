"""A row as a document: its columns of text, messages and difficulty."""

import math
from typing import Any

from curriq.config import SourceConfig
from curriq.data.chat import read_conversation, render_plain
from curriq.data.documents import Document, shorten, valid_text
from curriq.data.rows import BadRow, Row


def document_of(row: Row, config: SourceConfig) -> Document | None:
    """The row as a document; None when its text is empty.

    Raises:
        BadRow: a column is missing, or holds neither a text nor a conversation, or no number as difficulty.
    """
    field = config.text_field
    value = _column(row, field, "text_field", "text")
    messages = read_conversation(value)
    text = value if messages is None else render_plain(messages)
    if not isinstance(text, str):
        raise BadRow(
            f"column {field!r} holds {shorten(value)} ({type(value).__name__}), neither a text nor a "
            'conversation, a list of {"role": …, "content": …}. Name the column of the text with '
            f"text_field=COLUMN; columns: {', '.join(row)}."
        )
    difficulty = _difficulty(row, config)
    if not text or text.isspace():
        return None
    return Document(valid_text(text).strip("\n"), difficulty=difficulty, messages=messages)


def _difficulty(row: Row, config: SourceConfig) -> float:
    field = config.difficulty_field
    value = _column(row, field, "difficulty_field", "difficulty") if field else None
    if value is None or value == "":
        return math.nan
    try:
        number = math.inf if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isinf(number):
        raise BadRow(
            f"column {field!r} holds {shorten(value)}; a difficulty must be a number (higher is harder). "
            "Name a numeric column, or leave difficulty_field out."
        )
    return number


def _column(row: Row, column: str, setting: str, meaning: str) -> Any:
    if column not in row:
        raise BadRow(
            f"there is no column {column!r} for the {meaning}. Columns: {', '.join(row)}. Name "
            f"one of them with {setting}=COLUMN."
        )
    return row[column]
