"""Time of models, measured side by side: interleaved, warmed up, repeated; median and spread."""

import copy
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm.auto import tqdm

from avit_lib.errors import UserError
from avit_lib.evaluation.allocator import buffers_kept
from avit_lib.evaluation.flops import counted_flops
from avit_lib.halting import executed_depth
from avit_lib.losses import AdaptiveLoss, TaskLoss
from avit_lib.model import AViT
from avit_lib.packed import packed_layers

MODELS = ("DeiT", "A-ViT masked", "A-ViT packed")
TIMED = ("DeiT", "A-ViT packed")  # where only these two are compared
TASKS, PRECISIONS = ("inference", "training"), ("float32", "bfloat16")
SYNTHETIC = dict(gamma=1.0, beta=-8.0, eps=0.01)  # with which no sigmoid is saturated

Step = Callable[[], None]  # of inference or training, on a batch


@dataclass(frozen=True)
class Workload:
    """A model that halts, the plain one of the same shape, and images whose tokens halt as
    described.
    """

    adaptive: AViT
    plain: nn.Module
    images: Tensor
    origin: str

    @torch.inference_mode()
    def describe(self) -> str:
        """Where the halting comes from, and how deep plain inference goes."""
        depth = executed_depth(
            self.adaptive.eval().forward_with_trace(self.images)[1].depth
        ).float()
        spread = depth.mean(dim=1).std(correction=0)
        layers = len(self.adaptive.blocks)
        words = f"mean depth {depth.mean():.2f} of {layers}, standard deviation between images {spread:.2f}"
        return f"{self.origin}: {words}"


def synthetic_workload(
    name: str,
    batch: int,
    mean_depth: float,
    image_spread: float = 1.5,
    token_spread: float = 2.0,
    seed: int = 0,
) -> Workload:
    """An untrained ``avit_*`` whose patches halt around ``mean_depth``; the class token runs to the
    last layer.

    No block writes to channel 0: a token keeps the score that its patch's brightness gives it, for
    the layer drawn for it. Image means deviate by ``image_spread`` layers, patches within an image
    by ``token_spread``.
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
    halts = (drawn + (mean_depth - drawn.mean())).round().clamp(1, layers)
    score = (1 - adaptive.eps) / (halts - 0.5)  # its multiple passes 1 - eps in layer ``halts``
    score = torch.where(halts == 1, torch.tensor(0.9999), score).clamp(max=0.9999)
    channel = (torch.logit(score) - adaptive.beta) / adaptive.gamma
    size = adaptive.patch_embed.patch_size
    images = (
        channel.repeat_interleave(size[0], 2)
        .repeat_interleave(size[1], 3)
        .expand(-1, adaptive.in_chans, -1, -1)
    )
    return Workload(adaptive, plain, images.contiguous(), "synthetic halting of an untrained model")


def without_halting(workload: Workload) -> Workload:
    """The same images and models, but no token ever halts: what packed execution costs when it
    saves nothing.
    """
    adaptive = copy.deepcopy(workload.adaptive)
    adaptive.beta = -1e4
    return replace(workload, adaptive=adaptive, origin="no token halts")


def prepared(
    workload: Workload,
    task: str = "inference",
    precision: str = "float32",
    device: torch.device | str = "cpu",
) -> Workload:
    """A copy of the workload on a device, in the type that the precision means for the task."""
    if task not in TASKS or precision not in PRECISIONS:
        raise UserError(f"the tasks are {', '.join(TASKS)}, the precisions {', '.join(PRECISIONS)}")
    dtype = torch.bfloat16 if task == "inference" and precision == "bfloat16" else torch.float32
    adaptive, plain = (
        copy.deepcopy(model).to(device, dtype) for model in (workload.adaptive, workload.plain)
    )
    return replace(
        workload, adaptive=adaptive, plain=plain, images=workload.images.to(device, dtype)
    )


# --- timing ---------------------------------------------------------------------------------------


@buffers_kept()
def interleaved(
    functions: dict[str, Step], repeats: int, minimum: float = 0.2, limit: float = math.inf
) -> dict[str, list[float]]:
    """Seconds a call of each of ``functions``, interleaved so that a drift of the machine hits all
    alike.
    """
    calls, samples = {}, {name: [] for name in functions}
    for name, function in functions.items():
        seconds = _timed(function)
        if seconds < 10 * minimum:
            seconds = _timed(function)
        calls[name] = max(
            1, round(minimum / seconds)
        )  # as many as fill ``minimum`` seconds: a sample is their mean
    started = timer()
    for turn in tqdm(range(repeats), desc="timing", unit="round", leave=False, disable=None):
        if turn >= 3 and timer() - started > limit:  # three rounds are always made
            break
        for name, function in functions.items():
            samples[name].append(_timed(function, calls[name]))
    return samples


def timer() -> float:
    """Seconds, by a clock that waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _timed(function: Step, calls: int = 1) -> float:
    gc.collect()
    started = timer()
    for _ in range(calls):
        function()
    return (timer() - started) / calls


def compared(
    functions: dict[str, Step], batch: int, repeats: int, limit: float = math.inf
) -> pd.DataFrame:
    """The ``functions``, each a step on ``batch`` images, interleaved: a row each, with median and
    quartiles.

    ``speedup`` is the ratio of medians, against the first: within a round the first may be a minute
    away.
    """
    return _summarised(interleaved(functions, repeats, limit=limit), batch)


def _summarised(samples: dict[str, list[float]], batch: int) -> pd.DataFrame:
    rows, first = [], batch / np.median(next(iter(samples.values())))
    for name, seconds in samples.items():
        low, middle, high = batch / np.percentile(seconds, (75, 50, 25))
        rows.append(
            {
                "model": name,
                "batch": batch,
                "images_per_second": middle,
                "images_per_second_low": low,
                "images_per_second_high": high,
                "speedup": middle / first,
                "rounds": len(seconds),
            }
        )
    return pd.DataFrame(rows)


def throughput(
    models: dict[str, tuple[nn.Module, str]], images: Tensor, repeats: int = 21
) -> pd.DataFrame:
    """Several models in plain inference on the same images, ``compared``; each with its
    ``execution``, if it halts.
    """
    functions = {
        name: _inference(model.eval(), images, execution)
        for name, (model, execution) in models.items()
    }
    return compared(functions, len(images), repeats)


def _inference(model: nn.Module, images: Tensor, execution: str) -> Step:
    def infer() -> None:
        with torch.inference_mode():
            model.execution = execution
            model(images)

    return infer


def benchmark(
    workload: Workload,
    task: str,
    precision: str,
    repeats: int,
    device: torch.device,
    limit: float = math.inf,
    models: Sequence[str] = MODELS,
) -> pd.DataFrame:
    """DeiT, masked and packed A-ViT, or those of them in ``models``, ``compared`` on the images of
    ``workload``.

    ``task`` is "inference" or "training" (a whole step: forward, backward, AdamW); ``precision``
    "float32" or "bfloat16" (in inference weights and activations, in training autocast). Further
    columns: gflops_per_image (counted in a packed or plain run), flops_ratio against DeiT,
    efficiency = speedup / flops_ratio.
    """
    workload = prepared(workload, task, precision, device)
    functions = {name: step_of(workload, name, task, precision) for name in models}
    table = compared(functions, len(workload.images), repeats, limit)
    plain, packed = _flops(workload)
    flops = np.where(table["model"] == "A-ViT packed", packed, plain)
    ratio = plain / flops
    table = table.assign(
        gflops_per_image=flops / 1e9, flops_ratio=ratio, efficiency=table["speedup"] / ratio
    )
    return pd.DataFrame({"task": task, "precision": precision, **table})


def _flops(workload: Workload) -> tuple[float, float]:
    """FLOPs per image, counted, of the plain model and of the packed one."""
    workload.adaptive.execution = "packed"
    plain = counted_flops(workload.plain.eval(), workload.images[:8])
    return plain, counted_flops(workload.adaptive.eval(), workload.images)


def step_of(workload: Workload, name: str, task: str, precision: str) -> Step:
    """A function that does one inference or training step of the model called ``name`` on a
    ``prepared`` workload.
    """
    model = workload.plain if name == "DeiT" else workload.adaptive
    images, execution = workload.images, "masked" if name == "A-ViT masked" else "packed"
    if task == "inference":
        return _inference(model.eval(), images, execution)
    labels = torch.arange(len(images), device=images.device) % model.num_classes
    loss = TaskLoss() if name == "DeiT" else AdaptiveLoss()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, weight_decay=0.0
    )  # steps, but changes nothing

    def train() -> None:
        model.execution = execution
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            total = loss(model.train(), images, labels).total
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    return train


def depth_sweep(
    name: str,
    depths: Sequence[float],
    batch: int,
    repeats: int,
    device: torch.device,
    limit: float = math.inf,
    seed: int = 0,
) -> pd.DataFrame:
    """Packed inference of ``avit_*`` ``name`` at several mean depths of a synthetic workload,
    float32: a row a depth.

    One DeiT and all depths take turns in each round. ``speedup`` is the median over rounds of the
    ratio within a round, ``speedup_low`` and ``speedup_high`` are its quartiles. The further
    columns are those of ``benchmark``; ``limit`` is in seconds a depth.
    """
    workloads = [
        prepared(synthetic_workload(name, batch, depth, seed=seed), device=device)
        for depth in depths
    ]
    functions = {"DeiT": step_of(workloads[0], "DeiT", "inference", "float32")}
    for depth, workload in zip(depths, workloads, strict=True):
        functions[f"{depth}"] = step_of(workload, "A-ViT packed", "inference", "float32")
    samples = interleaved(functions, repeats, limit=limit * len(depths))
    table = (
        _summarised(samples, batch)[1:]
        .rename(columns={"model": "mean_depth"})
        .astype({"mean_depth": float})
    )
    deit, *packed = samples.values()
    low, speedup, high = np.percentile(np.array(deit) / np.array(packed), (25, 50, 75), axis=1)
    plain, packed = np.array([_flops(workload) for workload in workloads]).T
    ratio = plain / packed
    columns = {
        "speedup": speedup,
        "speedup_low": low,
        "speedup_high": high,
        "gflops_per_image": packed / 1e9,
    }
    return table.assign(**columns, flops_ratio=ratio, efficiency=speedup / ratio).reset_index(
        drop=True
    )


@buffers_kept()
@torch.inference_mode()
def layer_times(workload: Workload, repeats: int = 7) -> pd.DataFrame:
    """Where the time goes, layer by layer, in plain inference: one row a layer.

    Columns: layer, tokens (mean per image that A-ViT computes in it), deit and packed (milliseconds
    an image, medians over rounds; packed includes all of the bookkeeping), ideal (the mean of
    DeiT's, times the share of tokens left).
    """
    plain, adaptive, images = workload.plain.eval(), workload.adaptive.eval(), workload.images
    layers = len(plain.blocks)
    times, tokens = (
        {name: np.zeros((repeats + 1, layers)) for name in ("deit", "packed")},
        np.zeros(layers),
    )
    for turn in range(repeats + 1):  # the first is for warming up
        x, before = adaptive.embed(images), timer()
        for layer, block in enumerate(plain.blocks):
            x = block(x)
            before, times["deit"][turn, layer] = timer(), timer() - before
        x, before = adaptive.embed(images), timer()
        for layer, (layout, *_) in enumerate(
            packed_layers(adaptive.blocks, x, adaptive.rule, every_token=False)
        ):
            tokens[layer] = sum(layout.lengths) / len(images)
            before, times["packed"][turn, layer] = timer(), timer() - before
    per_image = {
        name: 1e3 * np.median(values[1:], axis=0) / len(images) for name, values in times.items()
    }
    table = pd.DataFrame({"layer": np.arange(1, layers + 1), "tokens": tokens, **per_image})
    return table.assign(ideal=table["deit"].mean() * tokens / tokens[0])


@buffers_kept()
@torch.inference_mode()
def operator_times(workload: Workload, repeats: int = 7) -> pd.DataFrame:
    """What the layers take in plain inference, by operator of torch: one row an operator, the
    longest first.

    Columns: operator, deit and packed (milliseconds an image, medians over passes), ideal (DeiT's,
    times the share of tokens left, as in ``layer_times``), above (packed - ideal), above_low and
    above_high (its quartiles over passes). On a GPU the time is that of its kernels. What lies
    between operators, such as Python, is in none of them.
    """
    plain, adaptive, images = workload.plain.eval(), workload.adaptive.eval(), workload.images
    x, passes, gpu = adaptive.embed(images), [], images.device.type == "cuda"

    def packed() -> int:
        ways = packed_layers(adaptive.blocks, x, adaptive.rule, every_token=False)
        return sum(len(layout.index) for layout, *_ in ways)

    share = packed() / (x.shape[0] * x.shape[1] * len(plain.blocks))
    for _ in range(repeats + 1):  # the first is for warming up
        one = {
            "deit": _by_operator(lambda: plain.blocks(x), gpu),
            "packed": _by_operator(packed, gpu),
        }
        passes.append(pd.DataFrame(one).fillna(0.0) / len(images))
    times = pd.concat(passes[1:])
    times.insert(2, "ideal", share * times["deit"])
    times["above"] = times["packed"] - times["ideal"]
    by_operator = times.rename_axis("operator").groupby("operator")
    low, high = (by_operator["above"].quantile(end) for end in (0.25, 0.75))
    table = by_operator.median().assign(above_low=low, above_high=high)
    return table.sort_values("packed", ascending=False).reset_index()


def _by_operator(step: Callable[[], object], gpu: bool) -> pd.Series:
    """Milliseconds that ``step`` spends in each operator itself, under a name that people can
    read.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities, acc_events=True) as recorded:
        step()
        timer()
    found = {}
    for event in recorded.key_averages():
        if event.key.startswith("aten::"):
            name = event.key.removeprefix("aten::").strip(
                "_"
            )  # in place or not: index_add_, index_add
            name = (
                "attention" if "attention" in name else name
            )  # there are several, by device and type
            seconds = event.self_device_time_total if gpu else event.self_cpu_time_total
            found[name] = found.get(name, 0.0) + seconds / 1e3
    return pd.Series(found)
