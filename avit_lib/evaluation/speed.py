"""Time of models, measured side by side: interleaved, warmed up, repeated; median and spread."""

import gc
import random
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from avit_lib.evaluation.allocator import buffers_kept
from avit_lib.flops import flops_of, trace_model

Step = Callable[[], object]  # what is timed: of inference or training, on a batch


@buffers_kept()
def interleave(
    steps: dict[str, Step], repeats: int, minimum: float = 0.2
) -> dict[str, list[float]]:
    """Seconds a call of each of ``steps``, in turns, so that a drift of the machine hits all alike.

    Every round has another order, by chance: it may matter what ran before. A sample is the mean of
    as many calls as fill ``minimum`` seconds.
    """
    gc.collect()
    gc.freeze()  # or a collection, by chance in a step, would look at all objects of the process
    calls, samples = {}, {name: [] for name in steps}
    chance = random.Random(0)
    try:
        for name, step in steps.items():
            seconds = _time(step)
            if seconds < 3 * minimum:  # the first call warms up
                seconds = _time(step)
            calls[name] = max(1, round(minimum / seconds))
        for _ in tqdm(range(repeats), desc="timing", unit="round", leave=False, disable=None):
            for name in chance.sample([*steps], len(steps)):
                samples[name].append(_time(steps[name], calls[name]))
                # Where only the first call was slow, the next samples take more.
                calls[name] = max(calls[name], round(minimum / samples[name][-1]))
    finally:
        gc.unfreeze()
    return samples


def read_clock() -> float:
    """Seconds, by a clock that waits for the GPUs in use, if there are any."""
    for device in range(torch.cuda.device_count()):
        if torch.cuda.memory_reserved(device):  # or this would start one that nobody uses
            torch.cuda.synchronize(device)
    return time.perf_counter()


def _time(step: Step, calls: int = 1) -> float:
    started = read_clock()
    for _ in range(calls):
        step()
    return (read_clock() - started) / calls


def infer(model: nn.Module, images: Tensor, execution: str = "packed") -> Step:
    """A step of plain inference; ``execution`` is that of a model whose tokens halt.

    The model stays in evaluation mode; between steps it has its own execution.
    """

    def step() -> None:
        own, model.execution = getattr(model, "execution", execution), execution
        with torch.inference_mode():
            model(images)
        model.execution = own

    model.eval()
    return step


def compare(steps: dict[str, Step], batch: int, repeats: int) -> pd.DataFrame:
    """The ``steps``, each on ``batch`` images, interleaved: a row each, with median and quartiles.

    ``speedup`` is the ratio of medians, against the first: within a round the first may be a minute
    away.
    """
    samples = interleave(steps, repeats)
    table = pd.DataFrame({"model": list(samples), "batch": batch})
    rates = batch / np.percentile([*samples.values()], (50, 75, 25), axis=1)  # [3, models]
    for column, rate in zip(("", "_low", "_high"), rates, strict=True):
        table[f"images_per_second{column}"] = rate
    table["speedup"] = rates[0] / rates[0, 0]
    return table.assign(rounds=repeats)


def throughput(
    models: dict[str, tuple[nn.Module, str]], images: Tensor, repeats: int = 21
) -> pd.DataFrame:
    """Several models, each with its ``execution``, in plain inference on the same images."""
    steps = {name: infer(model, images, execution) for name, (model, execution) in models.items()}
    return compare(steps, len(images), repeats)


def benchmark_model(model: nn.Module, plain: nn.Module, images: Tensor) -> pd.DataFrame:
    """What ``model`` gains over its ``plain`` twin on this machine: two rows a batch size.

    Columns are those of ``compare`` and flops_saved, on ``images`` [B, C, H, W] that both models
    take; batches are of 1, 8 and 64 images, if there are as many.
    """
    tables = []
    for part in (images[:batch] for batch in (1, 8, 64) if batch <= len(images)):
        table = throughput({"plain": (plain, "packed"), "model": (model, "packed")}, part, 7)
        with torch.inference_mode():
            full, left = (
                flops_of(one, trace_model(one, part)[1]).sum().item() for one in (plain, model)
            )
        tables.append(table.assign(flops_saved=[0.0, 1 - left / full]))
    return pd.concat(tables, ignore_index=True)
