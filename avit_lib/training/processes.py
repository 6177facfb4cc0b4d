"""One training on several processes, started by ``torchrun`` or ``accelerate launch``; on a single
one nothing happens.

Each holds the whole model and computes its share of each batch; all average gradients and means,
the first one writes.
"""

import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avit_lib.errors import UserError


def count() -> int:
    """The number of processes that work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if count() > 1 else 0


@contextmanager
def processes() -> Iterator[None]:
    """Join the other processes of this launch, if there are any; only the first one prints while it
    lasts.

    nccl between GPUs, one to a process; gloo between CPUs. Raises UserError when there are fewer
    GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    gpus, local_rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if gpus:
        if local_rank >= gpus:
            raise UserError(
                f"process {local_rank} has no GPU: there are {gpus}; start as many processes as GPUs"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    with open(os.devnull, "w") as nowhere:
        silent = rank() > 0
        with (
            redirect_stdout(nowhere if silent else sys.stdout),
            redirect_stderr(nowhere if silent else sys.stderr),
        ):
            yield
    # After a fault it would wait for the others; then the launcher ends them
    dist.destroy_process_group()


def barrier() -> None:
    """Wait until every process has come here."""
    if count() > 1:
        with _others_alive():
            dist.barrier()


def part(images: int) -> Tensor:
    """The indices of those of n ``images`` that this process evaluates.

    Every process gets ceil(n / count), so that results can be gathered: the last ones may begin
    again at the first.
    """
    each = math.ceil(images / count())
    return torch.arange(rank(), each * count(), count()) % images


def gather(values: Tensor, images: int) -> Tensor:
    """Put the ``values`` [k, ...] that the processes computed on their ``part`` into the order of
    the n ``images``.
    """
    parts = [torch.empty_like(values) for _ in range(count())]
    with _others_alive():
        dist.all_gather(parts, values.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)[:images]


def mean(value: Tensor) -> Tensor:
    """The mean of ``value`` over the processes.

    Its gradient goes to the own value in full: ``average_gradients`` afterwards makes that the
    gradient of the mean.
    """
    if count() == 1:
        return value
    total = value.detach().clone()
    with _others_alive():
        dist.all_reduce(total)
    return value + (total / count() - value.detach())


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradient of each parameter by its mean over the processes; every parameter must
    have one.
    """
    if count() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.requires_grad]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with _others_alive():
        dist.all_reduce(flat)
    for gradient, total in zip(
        gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(total.view_as(gradient) / count())


@contextmanager
def _others_alive() -> Iterator[None]:
    """Says in words when a process that we talk to is gone."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"another process of this run has ended ({str(error).splitlines()[0]}); run the same command again: "
            f"it resumes after the last finished epoch"
        ) from None
