"""Runs curriq's commands under faults, in forks of one process that has the libraries already.

`python -m tests.faults.server` reads lines of JSON, {"arguments": […], "out": FILE, "fault": {…}}; it answers
with the exit status, negative for a signal. Faults:

    {"root": FOLDER, "operations": 31, "at": n, "error": errno, "stay": false, "list": FILE}   see faults.c
    {"root": FOLDER, "power": n, "image": FOLDER, "names": true}                               see PowerLoss
    {"kill": seconds}
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any


class PowerLoss:
    """Ends the process at the n-th change of files below a folder, and leaves an image of what the disk has.

    The disk has the content that a file had at its last fsync, and the names that a folder had at its own.
    With `names` it has all names, as when the file system's journal was faster than its data: a file then has
    its size, and zeros where nothing was forced.
    """

    CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")

    def __init__(self, root: str, power: int, image: str, names: bool) -> None:
        self.root, self.at, self.image, self.all_names = Path(root), power, Path(image), names
        self.changes = 0
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, tuple[int, bool]]] = {}
        self.held: list[int] = []  # open descriptors, so that no inode is used again
        for path in (self.root, *self.root.rglob("*")):
            self.sync(path)
        self._fsync = os.fsync
        os.fsync = self.fsync
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        flags = arguments[2] if event == "open" else 0
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
        if (event in self.CHANGES or writes) and str(arguments[0]).startswith(str(self.root)):
            self.count()

    def count(self) -> None:
        self.changes += 1
        if self.changes == self.at:
            self.at = -1
            self.lose()

    def fsync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        inside = path.is_relative_to(self.root)
        if inside:
            self.count()
        self._fsync(descriptor)
        if inside:
            self.sync(path)
            self.count()

    def sync(self, path: Path) -> None:
        inode = path.stat().st_ino
        if inode not in self.contents and inode not in self.names:
            self.held.append(os.open(path, os.O_RDONLY))
        if path.is_dir():
            self.names[inode] = {e.name: (e.inode(), e.is_dir()) for e in os.scandir(path)}
        else:
            self.contents[inode] = path.read_bytes()

    def lose(self) -> None:
        if self.all_names:
            self.image_of_names()
        else:
            self.image_of_forced(self.root.stat().st_ino, True, self.image)
        os._exit(9)

    def image_of_forced(self, inode: int, is_folder: bool, to: Path) -> None:
        if is_folder:
            to.mkdir()
            for name, entry in self.names.get(inode, {}).items():
                self.image_of_forced(*entry, to / name)
        else:
            to.write_bytes(self.contents.get(inode, b""))

    def image_of_names(self) -> None:
        for path in (self.root, *sorted(self.root.rglob("*"))):
            to, stat = self.image / path.relative_to(self.root), path.stat()
            if path.is_dir():
                to.mkdir()
            else:
                forced = self.contents.get(stat.st_ino, b"")[: stat.st_size]
                to.write_bytes(forced.ljust(stat.st_size, b"\0"))


def arm(fault: dict[str, Any]) -> None:
    if "power" in fault:
        PowerLoss(**fault)
    elif "at" in fault:
        listed = fault.get("list")
        descriptor = os.open(listed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if listed else -1
        library = ctypes.CDLL(None)
        library.fault_arm(
            fault["root"].encode(),
            fault["operations"],
            ctypes.c_long(fault["at"]),
            fault["error"],
            int(fault.get("stay", False)),
            descriptor,
        )


def child(request: dict[str, Any]) -> None:
    """Run the command in this fork, and end it."""
    out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdin.close()
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    status = 99
    try:
        from curriq.cli import main

        arm(request.get("fault", {}))
        status = main(request["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(request: dict[str, Any]) -> int:
    process = os.fork()
    if process == 0:
        child(request)
    timer = threading.Timer(request.get("fault", {}).get("kill", 300), os.kill, (process, signal.SIGKILL))
    timer.start()
    _, status = os.waitpid(process, 0)
    timer.cancel()
    return os.waitstatus_to_exitcode(status)


def preload() -> None:
    import datasets
    import torch
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    import curriq.evaluate.tasks
    import curriq.report.command
    import curriq.train.run  # noqa: F401

    datasets.disable_progress_bars()
    torch.set_num_threads(1)


if __name__ == "__main__":
    preload()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        began = time.monotonic()
        status = run(json.loads(line))
        print(json.dumps({"status": status, "seconds": time.monotonic() - began}), flush=True)
