"""One training on several processes, started by ``torchrun``; on a single one nothing happens.

Each holds the whole model and computes its share of each batch; all average gradients and means,
the first one writes.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avit_lib.errors import UserError

SAID_BY_LAUNCHER = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def count() -> int:
    """The number of processes that work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if count() > 1 else 0


@contextmanager
def join_others() -> Iterator[None]:
    """Join the other processes of this launch, if there are any; only the first one prints then.

    nccl between GPUs, one to a process; gloo between CPUs. Raises UserError when there are fewer
    GPUs than processes, and when the launcher has not said what they need.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if lacking := [name for name in SAID_BY_LAUNCHER if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is set, but not {', '.join(lacking)}: unset it, or start by torchrun"
        )
    gpus = torch.cuda.device_count()
    if gpus:
        started = int(os.environ["LOCAL_WORLD_SIZE"])
        if gpus < started:
            raise UserError(f"{started} processes share {gpus} GPUs; start at most one to a GPU")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    with open(os.devnull, "w") as nowhere:
        out, err = (nowhere, nowhere) if rank() else (sys.stdout, sys.stderr)
        with redirect_stdout(out), redirect_stderr(err):
            yield
    # After a fault it would wait for the others; then the launcher ends them.
    dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process has come here."""
    if count() > 1:
        dist.barrier()


def share(model: nn.Module) -> None:
    """Give all processes the weights that the first one has: a fit may round in each otherwise."""
    if count() > 1:
        for value in model.state_dict().values():
            dist.broadcast(value, 0)


def mean(value: Tensor) -> Tensor:
    """The mean of ``value`` over the processes.

    Its gradient goes to the own value in full: ``average_gradients`` afterwards makes that the
    gradient of the mean.
    """
    if count() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return value + (total / count() - value.detach())


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace the gradient of each parameter by its mean over the processes; all must have one."""
    if count() > 1:
        for parameter in parameters:
            dist.all_reduce(parameter.grad)
            parameter.grad /= count()
