"""Names of models, tokenizers and data sets: a path on this machine, or a name on the Hugging Face hub."""

import functools
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from curriq.data.files import user_path
from curriq.errors import CurriqError

TIMEOUT = 5.0
"""Seconds in which the hub must answer once; its own clients retry for minutes where there is no network."""


def is_hub_name(name: str) -> bool:
    """Whether the hub can have this name, which is NAME or OWNER/NAME."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None


def locate(setting: str, name: str) -> tuple[str, bool]:
    """Where a name leads: the path of a folder or file, or the name on the hub; and whether it is a path.

    Raises:
        CurriqError: the name can only be a path, and nothing is there.
    """
    path = user_path(name)
    if os.path.exists(path):  # Path.exists raises for a name that is too long
        return str(path), True
    if not is_hub_name(name):
        raise CurriqError(
            f"{setting} {name!r} is a path, and there is no such folder (current folder: {Path.cwd()}). "
            "Check the path; a model of the hub is named OWNER/NAME."
        )
    return name, False


@contextmanager
def hub() -> Generator[None]:
    """Read from the hub; where it does not answer, from its cache alone, without retries.

    Raises:
        ConnectionError: reading failed, and the hub had not answered.
    """
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    reason = "" if constants.HF_HUB_OFFLINE else _why_unreachable(constants.ENDPOINT)
    if reason:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:
        if not reason:
            raise
        raise ConnectionError(f"{constants.ENDPOINT} cannot be reached: {reason}") from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def why_unreachable() -> str:
    """What keeps the hub from being asked; empty where it answers."""
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _why_unreachable(constants.ENDPOINT)


@functools.cache
def _why_unreachable(endpoint: str) -> str:
    """What keeps the hub from answering; empty where it answers."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=TIMEOUT)
    except Exception as error:  # whatever the client raises for names, routes, proxies and certificates
        return f"{type(error).__name__}: {error}"[:200]
    return ""
