"""Stands in for upstream's module of this name: processes on the CPU, joined by gloo."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    pass  # the CPU is not selected by rank


def _start_rank_processes(function, args: tuple, nprocs: int) -> None:
    mp.spawn(function, args=args, nprocs=nprocs)


def run_distributed(world_size: int):
    """`run_distributed(2)(function)(*args)` calls `function(rank, *args)` in two processes of one group."""

    def wrap(function):
        def call(*args):
            with tempfile.TemporaryDirectory() as folder:
                _start_rank_processes(_run_rank, (world_size, f"file://{folder}/store", function, args), world_size)

        return call

    return wrap


def _run_rank(rank: int, world_size: int, store: str, function, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    function(rank, *args)
    dist.destroy_process_group()
