"""Work done by several processes of one run, over gloo on this machine."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from curriq import parallel


def in_processes(world: int, work: Callable[..., None], *arguments: Any, machines: int = 1) -> None:
    """Run `work(*arguments)` on so many ranks, as if on so many machines; fails when one of them does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["curriq.train.run", "transformers.models.gpt2.modeling_gpt2", "datasets"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = world, world // machines, port, work, arguments
    processes = [context.Process(target=_as_rank, args=(rank, *shared)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * world


def _as_rank(
    rank: int, world: int, here: int, port: int, work: Callable[..., None], arguments: tuple
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % here),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(here),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    parallel.start()
    work(*arguments)
    parallel.barrier()
    torch.distributed.destroy_process_group()
