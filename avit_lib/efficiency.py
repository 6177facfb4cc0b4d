"""Time and memory of models, measured side by side: interleaved, warmed up, repeated; median and spread."""

import copy
import gc
import itertools
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from avit_lib.config import Halting, StudyError
from avit_lib.losses import AdaptiveLoss, TaskLoss
from avit_lib.models import AViT
from avit_lib.packed import packed_layers

MODELS = ("DeiT", "A-ViT masked", "A-ViT packed")
TIMED = ("DeiT", "A-ViT packed")  # where only these two are compared
TASKS, PRECISIONS = ("inference", "training"), ("float32", "bfloat16")
# Of the synthetic workload: channel 0 lies where no sigmoid is saturated.
SYNTHETIC = dict(gamma=1.0, beta=-8.0, eps=0.01)


@dataclass(frozen=True)
class Workload:
    """A model that halts, the plain one of the same shape, and images whose tokens halt as described."""

    adaptive: AViT
    plain: nn.Module
    images: Tensor
    origin: str

    @torch.inference_mode()
    def describe(self) -> str:
        """Where the halting comes from, and how deep plain inference goes."""
        depth = self.adaptive.eval().forward_with_trace(self.images)[1].executed_depth.float()
        spread = depth.mean(dim=1).std(correction=0)
        layers = len(self.adaptive.blocks)
        return f"{self.origin}: mean depth {depth.mean():.2f} of {layers}, deviation between images {spread:.2f}"


def synthetic_workload(
    name: str, batch: int, mean_depth: float, image_spread: float = 1.5, token_spread: float = 2.0, seed: int = 0
) -> Workload:
    """An untrained ``avit_*`` whose patches halt around ``mean_depth``, differently in every image.

    No block writes to channel 0, so a token keeps the score that its patch's brightness gives it, and the images are
    made of the brightness that halts each patch in the layer drawn for it: image means deviate by ``image_spread``
    layers, patches within an image by ``token_spread``. The class token runs to the last layer.
    """
    generator = torch.Generator().manual_seed(seed)
    adaptive = timm.create_model(name, **SYNTHETIC).eval()
    plain = timm.create_model(name.replace("avit", "deit")).eval()
    layers, grid = len(adaptive.blocks), adaptive.patch_embed.grid_size
    with torch.no_grad():
        for block in adaptive.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight[0], layer.bias[0] = 0.0, 0.0
        patch = adaptive.patch_embed.proj
        patch.weight[0], patch.bias[0] = 1 / patch.weight[0].numel(), 0.0
        adaptive.pos_embed[..., 0], adaptive.cls_token[..., 0] = 0.0, -100.0
    means = mean_depth + image_spread * torch.randn(batch, 1, 1, 1, generator=generator)
    drawn = means + token_spread * torch.randn(batch, 1, *grid, generator=generator)
    drawn = drawn + (mean_depth - drawn.mean())
    halts = drawn.round().clamp(1, layers)
    score = (1 - adaptive.eps) / (halts - 0.5)  # its multiple passes 1 - eps in layer ``halts``
    score = torch.where(halts == 1, torch.tensor(0.9999), score).clamp(max=0.9999)
    channel = (torch.logit(score) - adaptive.beta) / adaptive.gamma
    size = adaptive.patch_embed.patch_size
    images = channel.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)
    images = images.expand(-1, adaptive.in_chans, -1, -1).contiguous()
    return Workload(adaptive, plain, images, "synthetic halting of an untrained model")


def trained_workload(adaptive: AViT, plain: nn.Module, images: Tensor) -> Workload:
    """Trained models on real images [B, C, H, W]."""
    device = next(plain.parameters()).device
    return Workload(adaptive.eval(), plain.eval(), images.to(device), "trained models on test images")


def without_halting(workload: Workload) -> Workload:
    """The same images and models, but no token ever halts: what packed execution costs when it saves nothing."""
    adaptive = copy.deepcopy(workload.adaptive)
    adaptive.beta = -1e4
    return replace(workload, adaptive=adaptive, origin="no token halts")


def on_device(workload: Workload, device: torch.device, dtype: torch.dtype = torch.float32) -> Workload:
    """A copy of the workload on a device, in a type."""
    adaptive, plain = (copy.deepcopy(model).to(device, dtype) for model in (workload.adaptive, workload.plain))
    return replace(workload, adaptive=adaptive, plain=plain, images=workload.images.to(device, dtype))


def counted_flops(model: nn.Module, images: Tensor) -> float:
    """FLOPs per image that a forward pass really performs, by torch's counter; a multiply-add counts as one."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() / 2 / len(images)


# --- timing -----------------------------------------------------------------------------------------------------------


def interleaved(
    functions: dict[str, Callable[[], None]],
    repeats: int,
    device: torch.device,
    minimum: float = 0.2,
    limit: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each call of ``functions``, taken in turns so that a drift of the machine hits all alike.

    Each is warmed up, twice if it is quick; a sample is the mean of as many calls as fill ``minimum`` seconds. After
    ``limit`` seconds no new round begins, but three are always made.
    """
    calls = {}
    for name, function in functions.items():
        seconds = _timed(function, 1, device)
        if seconds < 10 * minimum:
            seconds = _timed(function, 1, device)
        calls[name] = max(1, round(minimum / seconds))
    samples = {name: [] for name in functions}
    started = time.perf_counter()
    for turn in tqdm(range(repeats), desc="timing", unit="round", leave=False, disable=None):
        if turn >= 3 and time.perf_counter() - started > limit:
            break
        for name, function in functions.items():
            samples[name].append(_timed(function, calls[name], device))
    return samples


def _timed(function: Callable[[], None], calls: int, device: torch.device) -> float:
    gc.collect()
    _synchronise(device)
    started = time.perf_counter()
    for _ in range(calls):
        function()
    _synchronise(device)
    return (time.perf_counter() - started) / calls


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def throughput(models: dict[str, tuple[nn.Module, str]], images: Tensor, repeats: int = 7) -> pd.DataFrame:
    """Images a second of several models in plain inference on the same batch, one row each.

    ``models`` gives, for each name, a model and how it is executed ("masked", "packed"; no matter for one that does not
    halt). Columns: model, batch, images_per_second (median over rounds), its quartiles _low and _high, and speedup
    against the first model (median of the ratios within each round).
    """
    functions = {name: _inference(model.eval(), images, execution) for name, (model, execution) in models.items()}
    samples = interleaved(functions, repeats, images.device)
    first = next(iter(samples.values()))
    rows = []
    for name, seconds in samples.items():
        low, middle, high = np.percentile(len(images) / np.array(seconds), (25, 50, 75))
        rows.append({
            "model": name, "batch": len(images), "images_per_second": middle, "images_per_second_low": low,
            "images_per_second_high": high, "speedup": np.median(np.divide(first, seconds)),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _inference(model: nn.Module, images: Tensor, execution: str = "packed") -> Callable[[], None]:
    def infer() -> None:
        with torch.inference_mode():
            model.execution = execution
            model(images)

    return infer


# --- the benchmark ----------------------------------------------------------------------------------------------------


def benchmark(
    workload: Workload,
    task: str,
    precision: str,
    repeats: int,
    device: torch.device,
    limit: float = math.inf,
    models: Sequence[str] = MODELS,
) -> pd.DataFrame:
    """DeiT, masked and packed A-ViT, or those of them in ``models``, side by side on the images of ``workload``.

    One row each; DeiT is always among them, since the others are compared with it.

    ``task`` is "inference" or "training" (a whole step: forward, backward, AdamW); ``precision`` "float32" or
    "bfloat16" (in inference weights and activations, in training autocast). Columns: seconds (median over rounds),
    seconds_low and seconds_high (quartiles), images_per_second, gflops_per_image (counted in a packed or plain run),
    speedup and flops_ratio against DeiT, efficiency = speedup / flops_ratio, and the number of rounds.
    """
    workload = _prepared(workload, task, precision, device)
    functions = {name: _step(workload, name, task, precision, device) for name in models}
    samples = interleaved(functions, repeats, device, limit=limit)
    batch, few = len(workload.images), workload.images[:8]
    workload.plain.eval(), workload.adaptive.eval()
    workload.adaptive.execution = "packed"
    plain_flops = counted_flops(workload.plain, few)
    flops = {"DeiT": plain_flops, "A-ViT masked": plain_flops}
    flops["A-ViT packed"] = counted_flops(workload.adaptive, workload.images)
    rows = []
    for name in models:
        low, middle, high = np.percentile(samples[name], (25, 50, 75))
        rows.append({
            "task": task, "precision": precision, "batch": batch, "model": name, "seconds": middle,
            "seconds_low": low, "seconds_high": high, "images_per_second": batch / middle,
            "gflops_per_image": flops[name] / 1e9,
            "speedup": np.median(np.divide(samples["DeiT"], samples[name])), "flops_ratio": flops["DeiT"] / flops[name],
            "rounds": len(samples[name]),
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.insert(frame.columns.get_loc("rounds"), "efficiency", frame["speedup"] / frame["flops_ratio"])
    return frame


def _prepared(workload: Workload, task: str, precision: str, device: torch.device) -> Workload:
    """A copy of the workload on the device, in the type that the precision means for the task."""
    if task not in TASKS or precision not in PRECISIONS:
        raise StudyError(f"the tasks are {', '.join(TASKS)}, the precisions {', '.join(PRECISIONS)}")
    dtype = torch.bfloat16 if task == "inference" and precision == "bfloat16" else torch.float32
    return on_device(workload, device, dtype)


def _step(workload: Workload, name: str, task: str, precision: str, device: torch.device) -> Callable[[], None]:
    """A function that does one inference or training step of the model called ``name``."""
    model = workload.plain if name == "DeiT" else workload.adaptive
    images, execution = workload.images, "masked" if name == "A-ViT masked" else "packed"
    if task == "inference":
        return _inference(model.eval(), images, execution)
    labels = torch.arange(len(images), device=device) % model.num_classes
    loss = TaskLoss() if name == "DeiT" else AdaptiveLoss(Halting())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)  # steps, but changes nothing

    def train() -> None:
        model.execution = execution
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            total = loss(model.train(), images, labels).total
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    return train


def benchmark_all(
    name: str,
    mean_depth: float,
    batches: Sequence[int],
    tasks: Sequence[str],
    precisions: Sequence[str],
    repeats: int,
    device: torch.device,
    limit: float = math.inf,
) -> pd.DataFrame:
    """``benchmark`` of ``avit_*`` ``name`` on synthetic workloads: all tasks, precisions and batch sizes."""
    settings = list(itertools.product(tasks, precisions, batches))
    frames = []
    for task, precision, batch in tqdm(settings, desc="benchmark", unit="setting", disable=None):
        workload = synthetic_workload(name, batch, mean_depth)
        frames.append(benchmark(workload, task, precision, repeats, device, limit))
        speedup = frames[-1].set_index("model")["speedup"]["A-ViT packed"]
        tqdm.write(f"{task}, {precision}, batch {batch}: packed A-ViT at {speedup:.2f} times DeiT's speed")
    return pd.concat(frames, ignore_index=True)


def overhead_table(
    name: str, batches: Sequence[int], precisions: Sequence[str], repeats: int, device: torch.device, limit: float
) -> pd.DataFrame:
    """What packed inference costs above DeiT's when no token halts: one row a precision and batch size."""
    frames = []
    for precision, batch in itertools.product(precisions, batches):
        workload = without_halting(synthetic_workload(name, batch, mean_depth=1.0))
        frames.append(benchmark(workload, "inference", precision, repeats, device, limit, TIMED))
    table = _packed_rows(frames)
    return table[["precision", "batch", "seconds", "rounds"]].assign(overhead=1 / table["speedup"] - 1)


def memory_table(
    name: str, mean_depth: float, batch: int, tasks: Sequence[str], precisions: Sequence[str], device: torch.device
) -> pd.DataFrame:
    """Peak memory [MiB] of each model, and its share of DeiT's: one row a task, precision and model."""
    rows = []
    for task, precision in itertools.product(tasks, precisions):
        found = {
            model: peak_memory(name, model, batch, mean_depth, task, precision, device.type == "cuda")
            for model in MODELS
        }
        for model, mebibytes in found.items():
            row = {"task": task, "precision": precision, "batch": batch, "model": model}
            rows.append(row | {"peak_mib": mebibytes, "of_deit": mebibytes / found["DeiT"]})
    return pd.DataFrame(rows)


def depth_sweep(
    name: str, depths: Sequence[float], batch: int, repeats: int, device: torch.device, limit: float = math.inf
) -> pd.DataFrame:
    """Packed inference of ``avit_*`` ``name`` at several mean depths of a synthetic workload: rows of ``benchmark``."""
    frames = []
    for depth in tqdm(depths, desc="depths", unit="depth", leave=False, disable=None):
        workload = synthetic_workload(name, batch, depth)
        frame = benchmark(workload, "inference", "float32", repeats, device, limit, TIMED)
        frames.append(frame.assign(mean_depth=depth))
    return _packed_rows(frames)


def _packed_rows(frames: list[pd.DataFrame]) -> pd.DataFrame:
    table = pd.concat(frames, ignore_index=True)
    return table[table["model"] == "A-ViT packed"].reset_index(drop=True)


@torch.inference_mode()
def layer_times(workload: Workload, repeats: int = 7) -> pd.DataFrame:
    """Where the time goes, layer by layer, in plain inference: one row a layer.

    Columns: layer, tokens (mean per image that A-ViT computes in it), deit and packed (milliseconds an image, medians
    over rounds; packed includes all of the bookkeeping), ideal (DeiT's time times the share of tokens left).
    """
    plain, adaptive, images = workload.plain.eval(), workload.adaptive.eval(), workload.images
    layers, device = len(plain.blocks), images.device
    times = {"deit": np.zeros((repeats + 1, layers)), "packed": np.zeros((repeats + 1, layers))}
    tokens = np.zeros(layers)
    for turn in range(repeats + 1):  # the first is for warming up
        x = adaptive.embed(images)
        before = _now(device)
        for layer, block in enumerate(plain.blocks):
            x = block(x)
            before, times["deit"][turn, layer] = _now(device), _now(device) - before
        x = adaptive.embed(images)
        before = _now(device)
        for layer, (layout, *_) in enumerate(packed_layers(adaptive.blocks, x, adaptive.rule, every_token=False)):
            tokens[layer] = sum(layout.lengths) / len(images)
            before, times["packed"][turn, layer] = _now(device), _now(device) - before
    per_image = {name: 1e3 * np.median(values[1:], axis=0) / len(images) for name, values in times.items()}
    table = pd.DataFrame({"layer": np.arange(1, layers + 1), "tokens": tokens, **per_image})
    return table.assign(ideal=table["deit"] * tokens / tokens[0])


def _now(device: torch.device) -> float:
    _synchronise(device)
    return time.perf_counter()


OPERATORS = {  # what the profiler calls them on a CPU
    "linear layers": ("addmm", "mm", "mkldnn_linear", "convolution", "bmm"),
    "attention": ("scaled_dot_product", "_flash_attention", "_efficient_attention"),
    "GELU, norms, sums": ("gelu", "layer_norm", "add", "mul"),
    "moving tokens": ("index", "sort", "cat", "copy_", "where", "nonzero", "gather", "scatter"),
}


@torch.inference_mode()
def operator_times(workload: Workload, execution: str) -> pd.Series:
    """Milliseconds an image that plain inference spends in each kind of operator (CPU), and in all else between them.

    ``execution`` is "masked" or "packed" for the A-ViT of the workload, or "plain" for its DeiT.
    """
    model = workload.plain if execution == "plain" else workload.adaptive
    infer = _inference(model.eval(), workload.images, execution)
    infer()
    calls = 3
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        for _ in range(calls):
            infer()
    seconds = np.median([_timed(infer, 1, torch.device("cpu")) for _ in range(5)])
    spent = dict.fromkeys(OPERATORS, 0.0)
    for event in recorded.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, names in OPERATORS.items() if any(part in name for part in names)), None)
        if kind:
            spent[kind] += event.self_cpu_time_total / 1e3 / calls
    spent["all else"] = max(0.0, 1e3 * seconds - sum(spent.values()))
    return pd.Series(spent, name=execution) / len(workload.images)


def operator_table(workload: Workload) -> pd.DataFrame:
    """``operator_times`` of DeiT, masked and packed A-ViT: one row a kind of operator, milliseconds an image."""
    workload = on_device(workload, torch.device("cpu"))
    executions = dict(zip(("plain", "masked", "packed"), MODELS, strict=True))
    table = pd.concat(
        [operator_times(workload, execution).rename(name) for execution, name in executions.items()], axis=1
    )
    return table.rename_axis("operators").reset_index()


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_memory(name: str, model: str, batch: int, mean_depth: float, task: str, precision: str, gpu: bool) -> float:
    """Peak memory in MiB that steps of ``model`` (of ``MODELS``) take on a synthetic workload of ``avit_*`` ``name``.

    Weights and images are there before and do not count. On a CPU, measured in a fresh process: what a process once
    took from the system it may not give back.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory, (name, model, batch, mean_depth, task, precision, gpu))


def _peak_memory(name: str, model: str, batch: int, mean_depth: float, task: str, precision: str, gpu: bool) -> float:
    device = torch.device("cuda" if gpu else "cpu")
    workload = _prepared(synthetic_workload(name, batch, mean_depth), task, precision, device)
    step = _step(workload, model, task, precision, device)
    gc.collect()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _resident()
        _forget_highest_resident()
    for _ in range(2):
        step()
    after = torch.cuda.max_memory_allocated() if gpu else _highest_resident()
    return (after - before) / 2**20


def _resident() -> int:
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.exists() else _highest_resident()


def _forget_highest_resident() -> None:
    """Linux forgets a process's highest memory use on demand; elsewhere it includes what came before."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _highest_resident() -> int:
    """Bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
