"""The examples of examples/clients as modules."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

CLIENTS = Path(__file__).resolve().parents[2] / "examples" / "clients"
NEEDS = {"trainer": "accelerate", "trl_chat": "trl", "lora": "peft"}


@pytest.fixture(scope="session")
def client() -> Callable[[str], ModuleType]:
    """An example by its name; its test is skipped where what it needs is not installed."""
    if str(CLIENTS) not in sys.path:
        sys.path.insert(0, str(CLIENTS))

    def load(name: str) -> ModuleType:
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
        return importlib.import_module(name)

    return load
