"""Tests of what two tensor parallel ranks do, on a CPU."""

import os
import runpy
import subprocess
import sys
from tempfile import TemporaryDirectory
from typing import Callable

import torch

from sglang.srt.distributed import parallel_state
from sglang.test.test_utils import publish_build_topology


def run_on_two_ranks(test: Callable, *args: str) -> None:
    """Run `test(rank, *args)`, a function of a test's file, in two processes with gloo."""
    command = [sys.executable, "-W", "ignore", "-m", "sglang.test.two_ranks"]
    command += [test.__code__.co_filename, test.__name__]
    with TemporaryDirectory() as folder:
        command += [f"{folder}/store", *args]
        ranks = [
            subprocess.Popen(command, env={**os.environ, "RANK": str(rank)})
            for rank in range(2)
        ]
        statuses = [rank.wait() for rank in ranks]
    assert statuses == [0, 0], statuses


def main(file: str, test: str, store: str, *args: str) -> None:
    torch.set_num_threads(1)
    os.environ["SGLANG_NCCL_SO_PATH"] = "none"  # a CPU host has none
    rank = int(os.environ["RANK"])
    parallel_state.set_custom_all_reduce(False)
    parallel_state.init_distributed_environment(
        world_size=2,
        rank=rank,
        local_rank=rank,
        backend="gloo",
        distributed_init_method=f"file://{store}",
    )
    publish_build_topology(world_rank=rank, tp_size=2)
    parallel_state.initialize_model_parallel(backend="gloo")
    runpy.run_path(file)[test](rank, *args)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
