"""`curriq watch`: the report of a run in progress, on this machine only and read-only."""

import html
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from curriq.config import Within, require
from curriq.errors import CurriqError
from curriq.parser import Parser
from curriq.report.command import build, parse_runs
from curriq.terminal import visible

HOST = "127.0.0.1"
READ = (
    *("config.toml", "environment.json", "metrics.jsonl", "summary.json", "comparison.json"),
    *("candidates", "windows", "queries", "eval"),
)
"""What in a folder changes the page when it changes."""


@dataclass
class LivePage:
    """The page of some runs, made again only when their logs have grown."""

    folders: list[Path]  # of runs or of one comparison
    every: float  # seconds between the refreshes of the page
    topics: int  # clusters of the windows
    share: float = 0.1  # most of the time that making pages may take, so that the run itself is not slowed
    _lock: Any = field(default_factory=threading.Lock, init=False)
    _made: tuple[int, str] | None = field(default=None, init=False)
    _stamp: list[tuple[Path, int, int]] = field(default_factory=list, init=False)
    _not_before: float = field(default=0.0, init=False)

    def get(self) -> tuple[int, str]:
        """HTTP status and content; a run that cannot be read yet gives 503 and says why."""
        with self._lock:
            began = time.monotonic()
            if self._made is not None and began < self._not_before:
                return self._made
            try:
                stamp = self._logs()
                if self._made is None or stamp != self._stamp:
                    self._made = 200, build(self.folders, topics=self.topics).page(self.every)
                    self._stamp = stamp
            except Exception as error:
                # A file that is being written, or is damaged: the next request looks again.
                known = isinstance(error, (CurriqError, OSError))
                message = str(error) if known else f"{type(error).__name__}: {error}"
                # It asks again by itself until there is something to show.
                text = (
                    '<!doctype html><meta charset="utf-8">'
                    f'<meta http-equiv="refresh" content="{self.every:g}"><title>curriq watch</title>'
                    f"<p>Nothing to show yet: {html.escape(visible(message))}</p>"
                )
                self._made, self._stamp = (503, text), []
            ended = time.monotonic()
            self._not_before = ended + (ended - began) * (1 / self.share - 1)
            return self._made

    def _logs(self) -> list[tuple[Path, int, int]]:
        """Name, size and time of every file that the page is made of."""
        paths = [folder / name for folder in self.folders for name in READ]
        files = [file for path in paths for file in (path, *sorted(path.glob("*"))) if file.is_file()]
        return [(file, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]


def make_server(page: Callable[[], tuple[int, str]], port: int) -> ThreadingHTTPServer:
    """A server on the loopback interface that answers GET / alone; CurriqError when the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0  # seconds that a client may say nothing, or read nothing

        def do_GET(self) -> None:
            # A name that some web site resolves to this address must not read the page.
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if host not in (HOST, "localhost"):
                return self.send_error(403, "this page is for this machine only")
            if self.path.partition("?")[0] != "/":
                return self.send_error(404)
            status, content = page()
            body = content.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            """Silence per-request logging."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """Nothing: a client that has gone, or reads nothing, is no fault of this program."""

    try:
        return Server((HOST, port), Handler)
    except OSError as error:
        raise CurriqError(
            f"--port {port} cannot be opened ({error.strerror}): give another one; 0 takes a free one."
        ) from None


def main(arguments: Sequence[str]) -> int:
    """The command; serves until Ctrl-C."""
    parser = Parser(
        prog="curriq watch",
        description="Serve the report of a run in progress, refreshing, to browsers on this machine only. "
        "Over ssh, forward the port: ssh -L 8642:localhost:8642 HOST.",
    )
    parser.add_argument("--port", type=int, default=8642, help="port; 0 takes a free one (default: 8642)")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between refreshes (default: 5)")
    options = parse_runs(parser, arguments)
    Within("[1, 86400]", " seconds").check("every", options.every)
    Within("[0, 65535]", "; 0 takes a free one").check("port", options.port)
    for folder in options.RUN:
        require(folder.is_dir(), f"{folder} is no folder: give one that `curriq train` writes.")
    page = LivePage(options.RUN, options.every, options.topics)
    with make_server(page.get, options.port) as server:
        print(f"watching {', '.join(map(str, options.RUN))} at http://localhost:{server.server_port}/")
        print("Ctrl-C ends the watching, not the run.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("", file=sys.stderr)
    return 0
