"""Temporary folders for decompressed copies, which do not outlive a killed process for long."""

import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path

_PREFIX = "curriq-scratch-"
_NAME = re.compile(rf"{_PREFIX}(\d+)-(\d*)-\w+")


def scratch_folder(owner: object) -> Path:
    """A new temporary folder that is removed with its owner, or by the next process if this one is killed.

    Its name says which process made it: the number, which the system uses again, and the time of its start.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if _is_abandoned(left):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-{_start_of(os.getpid())}-"))
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_abandoned(folder: Path) -> bool:
    match = _NAME.fullmatch(folder.name)
    if match is None or os.name != "posix":  # elsewhere signal 0 would end the process
        return False
    pid, start = int(match[1]), match[2]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # a process of another user's
        pass
    return bool(start) and _start_of(pid) not in ("", start)


def _start_of(pid: int) -> str:
    """Clock ticks from the machine's start to the process's; empty where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
