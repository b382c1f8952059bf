"""The program, its libraries and the machine, as a run writes them down."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import curriq


def environment(device: torch.device) -> dict[str, Any]:
    """The program, its libraries and the machine, for `environment.json`."""
    return {
        "curriq": curriq.__version__,
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": str(device),
        "hardware": _hardware(device),
        "threads": torch.get_num_threads(),
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "datasets")
        },
    }


def _hardware(device: torch.device) -> str:
    """Name of the accelerator or of the processor, as far as the system reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.machine()}, {os.cpu_count()} cores"
