"""Training with several processes, started by `torchrun`: their ranks, and values that they share.

Tensors on CPUs are shared by gloo, those on GPUs by NCCL. Whether to continue is decided on the
CPUs, so that no process waits for its GPU.
"""

import gc
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from spairkit.errors import InputError

_PATIENCE = timedelta(hours=1)  # the other ranks wait this long while rank 0 validates
# gloo has no type of error of its own, but a place in its source, or one of these texts
_OF_GLOO = re.compile(
    r"/gloo/|Connection (closed|reset|refused)|Broken pipe|pair closure|Timed out waiting"
)


@dataclass(frozen=True)
class World:
    """The processes that train one model together; for a single process every method is free.

    All processes must call the methods in the same order. If another process has ended, they raise
    InputError; an exchange of GPUs may wait instead, until torchrun ends this process. Errors of
    this process, as those of its GPU, are raised as they are.
    """

    rank: int = 0
    """The rank of this process. Only rank 0 writes files and messages."""
    size: int = 1

    def greatest(self, number: int) -> int:
        """The maximum of `number` over all processes."""
        greatest = torch.tensor(number)
        self._together(lambda: dist.all_reduce(greatest, dist.ReduceOp.MAX))
        return int(greatest)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of `tensor` over all processes; its shape must be the same on all."""
        total = tensor.clone()
        self._together(lambda: dist.all_reduce(total))
        return total / self.size

    def from_first(self, data: bytes) -> bytes:
        """Broadcasts `data` from rank 0; ignored on other ranks."""
        length = torch.tensor(len(data))
        self._together(lambda: dist.broadcast(length, 0))
        shared = torch.zeros(int(length), dtype=torch.uint8)
        if self.rank == 0 and data:
            shared = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._together(lambda: dist.broadcast(shared, 0))
        return shared.numpy().tobytes()

    def average(self, tensors: list[Tensor]) -> None:
        """Replaces tensors, such as gradients, by their means over all processes.

        One exchange for all, which a CUDA graph can record; shapes must be the same on all ranks.
        """
        if self.size == 1 or not tensors:
            return
        means = self.mean(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = means.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))

    def _together(self, exchange: Callable[[], object]) -> None:
        if self.size == 1:
            return
        try:
            exchange()
        except RuntimeError as error:
            if not _is_of_the_group(error):
                raise
            raise InputError(
                "another process of this training has ended: see its message, or it was killed; "
                f"restart all processes with --resume ({str(error).splitlines()[0][:200]})"
            ) from error


def _is_of_the_group(error: RuntimeError) -> bool:
    """Whether the error comes from the process group rather than from this process."""
    return isinstance(error, dist.DistError) or bool(_OF_GLOO.search(str(error)))


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """The processes started by `torchrun`, or this one alone, and the device of this process.

    Args:
        device: without an index; with torchrun, each process of a machine takes its own GPU.

    Raises:
        InputError: there are more processes than GPUs.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield World(), device
        return
    if device.type == "cuda":
        number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= gpus:
            raise InputError(
                f"process {number + 1} of this machine finds {gpus} GPUs; "
                f"use torchrun --nproc-per-node={gpus}, or --device cpu"
            )
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
        # torch demands this of programs that record exchanges in CUDA graphs
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    yield World(dist.get_rank(), dist.get_world_size()), device
    # NCCL waits until each graph with an exchange is gone, and a trainer and its graph form a cycle
    gc.collect()
    # skipped after an error: it could wait for a process that has ended
    dist.destroy_process_group()
