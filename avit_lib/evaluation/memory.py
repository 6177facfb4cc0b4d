"""Peak memory of models, each in a process of its own."""

import gc
import multiprocessing
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

from avit_lib.evaluation.speed import prepared, step_of, synthetic_workload


def peak_memory(
    name: str,
    model: str,
    batch: int,
    mean_depth: float,
    task: str,
    precision: str,
    gpu: bool,
    seed: int = 0,
) -> float:
    """Peak MiB, above weights and images, of steps of ``model`` (of ``speed.MODELS``) on a
    synthetic workload.
    """
    about = dict(name=name, batch=batch, mean_depth=mean_depth, seed=seed)
    with multiprocessing.get_context("spawn").Pool(
        1
    ) as pool:  # what a process once took it may not give back
        return pool.apply(_peak_memory, (about, model, task, precision, gpu))


def _peak_memory(about: dict, model: str, task: str, precision: str, gpu: bool) -> float:
    workload = prepared(synthetic_workload(**about), task, precision, "cuda" if gpu else "cpu")
    step = step_of(workload, model, task, precision)
    gc.collect()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    with suppress(
        OSError
    ):  # Linux forgets a process's highest memory use on demand; elsewhere it includes the past
        Path("/proc/self/clear_refs").write_text("5")
    before = _highest(gpu)
    for _ in range(2):
        step()
    return (_highest(gpu) - before) / 2**20


def _highest(gpu: bool) -> int:
    """The most bytes that this process has held so far."""
    if gpu:
        return torch.cuda.max_memory_allocated()
    if (status := Path("/proc/self/status")).exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) * 1024
    import resource  # here, because Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
