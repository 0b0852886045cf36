"""Tests of what two tensor parallel ranks do, on a CPU."""

import os
from tempfile import TemporaryDirectory
from typing import Callable

import torch
from sglang.srt.distributed import parallel_state
from sglang.test.test_utils import publish_build_topology


def run_on_two_ranks(test: Callable, *args) -> None:
    """Run `test(rank, *args)` in two processes, which have gloo. Raises what one raised."""
    with TemporaryDirectory() as folder:
        arguments = f"{folder}/store", test, args
        torch.multiprocessing.spawn(_run, arguments, nprocs=2)


def _run(rank: int, store: str, test: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["SGLANG_NCCL_SO_PATH"] = "none"  # a CPU host has none
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
    test(rank, *args)
    torch.distributed.destroy_process_group()
