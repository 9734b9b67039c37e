"""One training by several processes, as `torchrun` starts them: who is who, and what is agreed.

What is agreed goes through the CPUs (gloo), also where gradients go from GPU to GPU (NCCL): no
process waits for its GPU to learn whether to go on.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spairkit.errors import InputError

_PATIENCE = timedelta(hours=1)  # the others wait for so long while the first one validates


@dataclass(frozen=True)
class World:
    """The processes that train one model together; one alone does the same at no cost.

    All of them must call the methods, and in the same order. Where another process has ended they
    raise InputError.
    """

    rank: int = 0
    """Of this process. The first one, 0, is the only one that writes and speaks."""
    size: int = 1

    def greatest(self, number: int) -> int:
        """The greatest of the numbers that the processes give."""
        greatest = torch.tensor(number)
        self._together(lambda: dist.all_reduce(greatest, dist.ReduceOp.MAX))
        return int(greatest)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of the tensors that the processes give, of one shape."""
        total = tensor.clone()
        self._together(lambda: dist.all_reduce(total))
        return total / self.size

    def from_first(self, data: bytes) -> bytes:
        """What the first process gives; of the others it is not looked at."""
        length = torch.tensor(len(data))
        self._together(lambda: dist.broadcast(length, 0))
        shared = torch.zeros(int(length), dtype=torch.uint8)
        if self.rank == 0 and data:
            shared = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._together(lambda: dist.broadcast(shared, 0))
        return shared.numpy().tobytes()

    def replica(self, model: nn.Module, *, partial: bool) -> nn.Module:
        """The model with the first process's weights; `backward` means gradients over all.

        Args:
            model: on the training's device.
            partial: whether some parameters get no gradient, which waits for the device.
        """
        if self.size == 1:
            return model
        return DistributedDataParallel(model, find_unused_parameters=partial)

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss`; those of a replica are the means over all processes."""
        if self.size == 1:
            loss.backward()
        else:
            self._together(loss.backward)

    def _together(self, exchange: Callable[[], object]) -> None:
        if self.size == 1:
            return
        try:
            exchange()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise InputError(
                "another process of this training has ended: it said why, or was killed; "
                "start all of them again with --resume"
            ) from error


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """The processes that `torchrun` started, or this one alone, and the device of this one.

    Args:
        device: without an index; with torchrun, each process of a machine takes a GPU of its own.

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
    # torch's convolutions give gradients with the channels last, and to copy them costs little
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    yield World(dist.get_rank(), dist.get_world_size()), device
    # not after an error: it could wait for a process that has ended
    dist.destroy_process_group()
