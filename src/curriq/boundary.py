"""The outermost boundary of the command line: whatever a command raises becomes one message and a status."""

import os
import platform
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import curriq
from curriq.errors import OWN_FILES, CurriqError

STATUSES = {
    0: "done",
    1: "some runs of a comparison failed; a check found faults; or the reader of the output has gone",
    2: "a mistake in the call, the settings, a file or your own code: the message says how to fix it",
    69: "another process of the run has ended, whose message says why",
    70: "a fault of curriq: the message names a file with the details",
    71: "too little memory",
    74: "the system refused to read or write, for instance on a full disk",
    130: "stopped by Ctrl-C, SIGTERM or SIGHUP; what was trained is saved",
}
"""Exit status → what it means. 69, 70, 71 and 74 are those of sysexits.h."""
DEBUG = "CURRIQ_DEBUG"
"""Environment variable: any value shows tracebacks."""
SHOWN = f"{DEBUG}=1 shows them here."


def exit_status(command: Callable[[], int]) -> int:
    """The exit status of a command, after a message on standard error when it has failed."""
    try:
        try:
            status = command()
        except SystemExit as exit:  # the argument parsers', after their help or error
            status = exit.code if isinstance(exit.code, int) else 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("curriq: stopped at once; the last checkpoint stands.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone (`| head`)
        _silence_output()
        return 1
    except Exception as error:
        return _explained(error)


def _explained(error: Exception) -> int:
    """The status of an error that ends a command, after its message."""
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    if isinstance(error, CurriqError):
        status, message = 2, str(error)
    elif isinstance(error, OSError):
        status, message = 74, _refused_by_system(error)
    elif _is_out_of_memory(error):
        fix = "lower --micro-batch, --num-candidates, --window or the size of the model"
        status, message = 71, f"there is too little memory ({_first_line(error)}): {fix}."
    elif _has_lost_another(error):
        status, message = 69, f"another process has ended, whose message says why ({_first_line(error)})."
    elif place := _in_own_code(error):
        status, message = 2, f"{place}: {_first_line(error)}. {_written_down(error)}. {SHOWN}"
    else:
        told = f"{_written_down(error)}; please report them. {SHOWN}"
        status, message = 70, f"this is a fault of curriq ({_first_line(error)}). {told}"
    print(f"curriq: {message}".replace("\n", "\n  "), file=sys.stderr)  # no line of it looks like our own
    return status


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, torch on a GPU or torch on the CPU (a plain RuntimeError) could not allocate memory."""
    is_torch = "OutOfMemory" in type(error).__name__ or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or is_torch


def _has_lost_another(error: Exception) -> bool:
    """Whether a process of several waited for one that has ended: gloo, NCCL and the store of torch raise
    RuntimeErrors of several types, each with its own text."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not isinstance(error, RuntimeError):
        return False
    backend = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    lost = re.search("Connection (closed|reset) by peer|Broken pipe|Connection refused", str(error))
    return backend or lost is not None


def _refused_by_system(error: OSError) -> str:
    try:
        sys.stdout.flush()
    except OSError:  # standard output itself is refused, such as a full disk that it is written to
        _silence_output()
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = f" for {' and '.join(names)}" if names else ""
    why = error.strerror or _first_line(error)
    return f"the system refused to read or write{where}: {why}. Put that right, and run the command again."


def _in_own_code(error: Exception) -> str:
    """File and line of an error in a component of the user's own, or in what it called; empty for others."""
    package = str(Path(curriq.__file__).parent)
    frames = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename in OWN_FILES or frame.filename.startswith(package)
    ]
    file, line = frames[-1] if frames else (package, 0)
    return f"{file}, line {line}" if file in OWN_FILES else ""


def _written_down(error: Exception) -> str:
    """Where the details of an error are, after writing them into a file."""
    details = [
        f"curriq {curriq.__version__}, Python {platform.python_version()}, {platform.platform()}",
        shlex.join(sys.argv),
        *traceback.format_exception(error),
    ]
    try:
        descriptor, name = tempfile.mkstemp(prefix="curriq-fault-", suffix=".log")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(details))
    except OSError:  # no temporary folder can be written
        traceback.print_exception(error)
        return "The details are above"
    return f"The details are in {Path(name)}"


def _first_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:300].rstrip(" .:")


def _silence_output() -> None:
    """Python must not flush into a broken standard output again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
