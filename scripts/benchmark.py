"""Time DeiT, masked and packed A-ViT side by side, and write what is found to results/benchmark.

    python scripts/benchmark.py [--model avit_tiny_patch16_224] [--depth 7] [--batch 1 8 64 256] ...

The halting is synthetic: an untrained model whose patches halt in layers drawn for them, the class
token in the last. Times depend on how many tokens are left where, not on what the weights have
learnt. bfloat16 means weights and activations in inference, autocast in training.
"""

import argparse
import copy
import gc
import math
import multiprocessing
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm.auto import tqdm

from avit_lib.errors import UserError
from avit_lib.evaluation import speed
from avit_lib.evaluation.allocator import buffers_kept
from avit_lib.evaluation.speed import Step, infer, read_clock
from avit_lib.flops import counted_flops
from avit_lib.halting import executed_depth
from avit_lib.losses import AdaptiveLoss, TaskLoss
from avit_lib.model import AViT
from avit_lib.packed import packed_layers
from avit_lib.report import figures
from avit_lib.study import get_profile
from avit_lib.study.results import Results, hardware
from avit_lib.training import pick_device

MODELS = ("DeiT", "A-ViT masked", "A-ViT packed")
COLOURS = {name: figures.PALETTE[one] for name, one in zip(MODELS, (0, 7, 1), strict=True)}
TASKS = ("inference", "training")
PRECISIONS = ("float32", "bfloat16")
SYNTHETIC = dict(gamma=1.0, beta=-8.0, eps=0.01)  # with which no sigmoid is saturated
SWEEP = (0.25, 0.4, 0.6, 0.75, 0.9)  # mean depths, as shares of the layers
IMAGENET_IMAGES = 1_281_167  # ILSVRC 2012, training
COST_CAPTION = (
    "Hours of one training of the imagenet profile on several devices like this one, at the "
    "batch size that is fastest here, as if they lost nothing by working together; evaluation "
    "not counted."
)


@dataclass(frozen=True)
class Plan:
    """What is to be timed, and how long."""

    model: str  # of timm's, avit_*
    depth: float  # mean depth in layers
    batches: Sequence[int]
    tasks: Sequence[str]
    precisions: Sequence[str]
    repeats: int  # rounds of a timing
    seed: int
    device: torch.device

    @property
    def middle(self) -> int:
        """The batch size of what is measured at one alone."""
        return sorted(self.batches)[len(self.batches) // 2]


class Workload(NamedTuple):
    """A model that halts, the plain one of the same shape, and images."""

    adaptive: AViT
    plain: nn.Module
    images: Tensor


def run_benchmark(plan: Plan) -> pd.DataFrame:
    """Measure everything and write it down; returns the table of speeds.

    Raises UserError for what cannot be measured.
    """
    check(plan)
    results, kind = Results("benchmark", plan.seed, "benchmark"), plan.device.type
    about = f"{plan.model} on {hardware()}; {describe(make_workload(plan))}."
    single = f"Batch {plan.middle}, inference, float32. {about}"

    speeds = time_models(plan)
    results.table(speeds, f"speed_{kind}", f"DeiT, masked and packed A-ViT side by side. {about}")
    caption = f"Images a second, with quartiles. {about}"
    results.figure(draw_throughput(speeds), f"throughput_{kind}", caption)

    caption = f"Packed inference when no token halts, as a share above DeiT. {about}"
    results.table(time_overhead(plan), f"overhead_{kind}", caption)

    sweep = sweep_depths(plan)
    results.table(sweep, f"depth_sweep_{kind}", f"Packed A-ViT at several mean depths. {single}")
    results.figure(draw_speedup(sweep), f"speedup_{kind}", f"Speed-up against FLOPs. {single}")

    layers = time_layers(plan)
    results.table(layers, f"layers_{kind}", f"Milliseconds an image in each layer. {single}")
    results.figure(draw_layers(layers), f"layers_{kind}", f"Time of each layer. {single}")

    memory = measure_memory(plan)
    caption = f"Peak memory above weights and images, in MiB. {about}"
    results.table(memory, f"memory_{kind}", caption)
    summary = summarise(speeds, memory)
    results.table(summary, f"summary_{kind}", f"Packed A-ViT against DeiT. {about}")
    if "training" in plan.tasks:
        results.table(estimate_cost(speeds), f"cost_{kind}", f"{COST_CAPTION} {about}")
    return speeds


def check(plan: Plan) -> None:
    """Raise UserError for a plan that cannot be measured."""
    if plan.model not in timm.list_models("avit_*"):
        raise UserError(f"no A-ViT is called {plan.model!r}; timm.list_models('avit_*') names them")
    if min(*plan.batches, plan.repeats) <= 0:
        raise UserError("batch sizes and repeats must be positive")
    layers = len(timm.create_model(plan.model).blocks)
    if not 1 <= plan.depth <= layers:
        raise UserError(f"the mean depth must lie between 1 and {layers}, not {plan.depth}")


# --- synthetic halting ----------------------------------------------------------------------------


def make_workload(plan: Plan, batch: int | None = None, depth: float | None = None) -> Workload:
    """The workload of a plan, at its middle batch and its depth unless others are given."""
    size = plan.middle if batch is None else batch
    workload = synthetic_workload(plan.model, size, depth or plan.depth, seed=plan.seed)
    return Workload(*(part.to(plan.device) for part in workload))


def synthetic_workload(
    name: str,
    batch: int,
    mean_depth: float,
    image_spread: float = 1.5,
    token_spread: float = 2.0,
    seed: int = 0,
) -> Workload:
    """An untrained ``avit_*`` whose patches halt around ``mean_depth``.

    The class token runs to the last layer. No block writes to channel 0: a token keeps the score
    that its patch's brightness gives it, for the layer drawn for it. Image means deviate by
    ``image_spread`` layers, patches within an image by ``token_spread``.
    """
    generator = torch.Generator().manual_seed(seed)
    adaptive = timm.create_model(name, **SYNTHETIC).eval()
    plain = timm.create_model(name.replace("avit", "deit")).eval()
    layers, embedding = len(adaptive.blocks), adaptive.patch_embed
    with torch.no_grad():
        for block in adaptive.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight[0] = 0.0
                layer.bias[0] = 0.0
        embedding.proj.weight[0] = 1 / embedding.proj.weight[0].numel()
        embedding.proj.bias[0] = 0.0
        adaptive.pos_embed[..., 0] = 0.0
        adaptive.cls_token[..., 0] = -100.0
    means = mean_depth + image_spread * torch.randn(batch, 1, 1, 1, generator=generator)
    grid = embedding.grid_size
    drawn = means + token_spread * torch.randn(batch, 1, *grid, generator=generator)
    halts = (drawn + (mean_depth - drawn.mean())).round().clamp(1, layers)
    score = (1 - adaptive.eps) / (halts - 0.5)  # its multiple passes 1 - eps in layer ``halts``
    score = score.clamp(max=0.9999)
    brightness = (torch.logit(score) - adaptive.beta) / adaptive.gamma
    height, width = embedding.patch_size
    images = brightness.repeat_interleave(height, 2).repeat_interleave(width, 3)
    return Workload(adaptive, plain, images.expand(-1, adaptive.in_chans, -1, -1).contiguous())


@torch.inference_mode()
def describe(workload: Workload) -> str:
    """Where the halting comes from, and how deep plain inference goes."""
    depth = executed_depth(workload.adaptive.forward_with_trace(workload.images)[1].depth).float()
    spread = depth.mean(dim=1).std(correction=0)
    return (
        f"synthetic halting of an untrained model: mean depth {depth.mean():.2f} of "
        f"{len(workload.adaptive.blocks)}, standard deviation between images {spread:.2f}"
    )


# --- measurements ---------------------------------------------------------------------------------


def time_models(plan: Plan) -> pd.DataFrame:
    """Speeds of DeiT, masked and packed A-ViT: a row a task, precision, batch size and model."""
    tables = []
    cases = list(product(plan.tasks, plan.precisions, plan.batches))
    for task, precision, batch in tqdm(cases, desc="benchmark", disable=None):
        found = time_workload(plan, make_workload(plan, batch), task, precision)
        speedup = found["speedup"].iloc[-1]
        tqdm.write(f"{task}, {precision}, batch {batch}: packed A-ViT {speedup:.2f} x DeiT")
        tables.append(found)
    return pd.concat(tables, ignore_index=True)


def time_workload(
    plan: Plan, workload: Workload, task: str, precision: str, models: Sequence[str] = MODELS
) -> pd.DataFrame:
    """``compare`` of some of ``MODELS`` on the images of a workload, and their FLOPs.

    gflops_per_image are counted in a packed or plain run; flops_ratio is against DeiT, efficiency =
    speedup / flops_ratio.
    """
    workload = cast(workload, task, precision)
    steps = {name: make_step(workload, name, task, precision) for name in models}
    table = speed.compare(steps, len(workload.images), plan.repeats)
    plain, packed = count_flops(workload)
    flops = np.where(table["model"] == "A-ViT packed", packed, plain)
    ratio = plain / flops
    efficiency = table["speedup"] / ratio
    table = table.assign(gflops_per_image=flops / 1e9, flops_ratio=ratio, efficiency=efficiency)
    return pd.DataFrame({"task": task, "precision": precision, **table})


def cast(workload: Workload, task: str, precision: str) -> Workload:
    """A copy of the workload in the type that a precision means for a task."""
    half = task == "inference" and precision == "bfloat16"
    dtype = torch.bfloat16 if half else torch.float32
    return Workload(*(copy.deepcopy(part).to(dtype) for part in workload))


def make_step(workload: Workload, name: str, task: str, precision: str) -> Step:
    """One step of the model called ``name``: inference, or forward, backward and AdamW."""
    model = workload.plain if name == "DeiT" else workload.adaptive
    images, execution = workload.images, "masked" if name == "A-ViT masked" else "packed"
    if task == "inference":
        return infer(model, images, execution)
    labels = torch.arange(len(images), device=images.device) % model.num_classes
    loss = TaskLoss() if name == "DeiT" else AdaptiveLoss()
    # It steps, but changes nothing.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)

    def train() -> None:
        model.execution = execution
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            total = loss(model.train(), images, labels).total
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    return train


def count_flops(workload: Workload) -> tuple[float, float]:
    """FLOPs per image of the plain model and of the packed one, counted."""
    workload.adaptive.execution = "packed"
    plain = counted_flops(workload.plain.eval(), workload.images[:8])
    return plain, counted_flops(workload.adaptive.eval(), workload.images)


def time_overhead(plan: Plan) -> pd.DataFrame:
    """What packed inference costs when it saves nothing, as a share above DeiT."""
    rows = []
    for precision, batch in product(plan.precisions, plan.batches):
        workload = make_workload(plan, batch)
        workload.adaptive.beta = -1e4  # no token halts
        found = time_workload(plan, workload, "inference", precision, ("DeiT", "A-ViT packed"))
        overhead = 1 / found["speedup"].iloc[-1] - 1
        rows.append({"precision": precision, "batch": batch, "overhead": overhead})
    return pd.DataFrame(rows)


def sweep_depths(plan: Plan) -> pd.DataFrame:
    """Packed inference, float32, at several mean depths: a row a depth.

    One DeiT and all depths take turns in each round. ``speedup`` is the median over rounds of the
    ratio within a round, ``speedup_low`` and ``speedup_high`` are its quartiles.
    """
    layers = len(timm.create_model(plan.model).blocks)
    depths = [round(share * layers, 1) for share in SWEEP]
    steps, flops = {}, []
    for depth in depths:
        workload = make_workload(plan, depth=depth)
        steps.setdefault("DeiT", infer(workload.plain, workload.images))
        steps[f"{depth}"] = infer(workload.adaptive, workload.images)
        flops.append(count_flops(workload))
    samples = speed.interleave(steps, plan.repeats)
    deit, *packed = samples.values()
    ratios = np.array(deit) / np.array(packed)  # [depths, rounds]
    low, speedup, high = np.percentile(ratios, (25, 50, 75), axis=1)
    plain, left = np.array(flops).T
    table = {
        "mean_depth": depths,
        "batch": plan.middle,
        "images_per_second": plan.middle / np.median(packed, axis=1),
        "speedup": speedup,
        "speedup_low": low,
        "speedup_high": high,
        "rounds": plan.repeats,
        "gflops_per_image": left / 1e9,
        "flops_ratio": plain / left,
        "efficiency": speedup * left / plain,
    }
    return pd.DataFrame(table)


@buffers_kept()
@torch.inference_mode()
def time_layers(plan: Plan) -> pd.DataFrame:
    """Where the time goes, layer by layer, in plain inference, float32: a row a layer.

    tokens: mean per image that A-ViT computes in it. deit and packed: milliseconds an image,
    medians over rounds; packed includes all of the bookkeeping. ideal: the mean of DeiT's, times
    the share of tokens left.
    """
    adaptive, plain, images = make_workload(plan)
    embedded, rounds = adaptive.embed(images), []
    for _ in range(plan.repeats + 1):  # the first is for warming up
        x, clock = embedded, [read_clock()]
        for block in plain.blocks:
            x = block(x)
            clock.append(read_clock())
        tokens, packed_clock = [], [read_clock()]
        layers = packed_layers(adaptive.blocks, embedded, adaptive.rule, every_token=False)
        for layout, *_ in layers:
            tokens.append(len(layout.index) / len(images))
            packed_clock.append(read_clock())
        rounds.append(np.diff([clock, packed_clock]))
    deit, packed = 1e3 * np.median(rounds[1:], axis=0) / len(images)
    table = {"layer": range(1, len(tokens) + 1), "tokens": tokens, "deit": deit, "packed": packed}
    ideal = deit.mean() * np.array(tokens) / tokens[0]
    return pd.DataFrame(table).assign(ideal=ideal)


def measure_memory(plan: Plan) -> pd.DataFrame:
    """Peak MiB of steps above weights and images: a row a task, precision and model."""
    rows = []
    for task, precision, model in product(plan.tasks, plan.precisions, MODELS):
        # In a process of its own: what one has once taken it may not give back.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak = pool.apply(peak_memory, (plan, model, task, precision))
        row = {"task": task, "precision": precision, "batch": plan.middle, "model": model}
        rows.append(row | {"peak_mib": peak})
    table = pd.DataFrame(rows)
    deit = table.groupby(["task", "precision"])["peak_mib"].transform("first")
    return table.assign(of_deit=table["peak_mib"] / deit)


def peak_memory(plan: Plan, model: str, task: str, precision: str) -> float:
    """Peak MiB of two steps of one of ``MODELS`` in this process, above what it held before."""
    workload = cast(make_workload(plan), task, precision)
    step = make_step(workload, model, task, precision)
    gpu = plan.device.type == "cuda"
    gc.collect()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    # Linux forgets a process's highest use on demand; elsewhere it includes the past.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = read_peak(gpu)
    for _ in range(2):
        step()
    return (read_peak(gpu) - before) / 2**20


def read_peak(gpu: bool) -> int:
    """The most bytes that this process has held so far."""
    if gpu:
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) * 1024
    import resource  # here, because Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- tables ---------------------------------------------------------------------------------------


def summarise(speeds: pd.DataFrame, memory: pd.DataFrame) -> pd.DataFrame:
    """The tables of speed and memory in words: one row a task, precision and batch size."""
    key = ["task", "precision", "batch"]
    by_model = {name: part.set_index(key) for name, part in speeds.groupby("model")}
    packed = by_model["A-ViT packed"]
    peaks = memory.query("model == 'A-ViT packed'").set_index(key)["of_deit"]
    table = pd.DataFrame(index=packed.index)
    for name in MODELS:
        rate = by_model[name]["images_per_second"]
        table[f"{name.removeprefix('A-ViT ')} [images/s]"] = rate.map("{:.1f}".format)
    table["speed-up"] = packed["speedup"].map("{:.2f}".format)
    table["FLOP ratio"] = packed["flops_ratio"].map("{:.2f}".format)
    table["efficiency"] = packed["efficiency"].map("{:.2f}".format)
    words = peaks.map("{:.0%}".format)
    table["peak memory of DeiT's"] = words.reindex(packed.index, fill_value="")
    return table.reset_index()


def estimate_cost(speeds: pd.DataFrame) -> pd.DataFrame:
    """Hours that the longest run of the imagenet profile takes, from the images/s of training."""
    profile = get_profile("imagenet")
    images = IMAGENET_IMAGES - 1000 * profile.data.validation_per_class
    by_model = speeds.query("task == 'training'").groupby(["model", "precision"], sort=False)
    table = by_model["images_per_second"].max().reset_index()
    epochs = max(run.training.epochs for run in profile.runs)
    hours = images * epochs / table["images_per_second"] / 3600
    return table.assign(**{f"hours on {count}": (hours / count).round(1) for count in (1, 4, 8)})


# --- figures --------------------------------------------------------------------------------------


def draw_throughput(table: pd.DataFrame) -> Figure:
    """Images a second against batch size, with quartiles; a panel for each task and precision."""
    panels = list(table.groupby(["task", "precision"], sort=False))
    rows, batches = math.ceil(len(panels) / 2), sorted(set(table["batch"]))
    figure, axes = figures.subplots(rows, min(2, len(panels)), 2.9 * rows, sharex=True)
    for axis, ((task, precision), part) in zip(axes.flat, panels, strict=False):
        for model, line in part.groupby("model", sort=False):
            low, high = line["images_per_second_low"], line["images_per_second_high"]
            look = {"color": COLOURS[model]}
            axis.fill_between(line["batch"], low, high, alpha=0.2, linewidth=0, **look)
            axis.plot(line["batch"], line["images_per_second"], "o-", label=model, **look)
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, batches)
        axis.minorticks_off()
        axis.set_xlabel("batch size [images]")
        axis.set(title=f"{task}, {precision}", ylabel="images/s", ylim=(0, None))
    return figures.legend_above(figure, axes[0, 0])


def draw_speedup(sweep: pd.DataFrame) -> Figure:
    """Measured speed-up over DeiT against the ratio of FLOPs, with quartiles, a point a depth."""
    figure, [[axis]] = figures.subplots(height=3.8)
    ratio, speedup = sweep["flops_ratio"], sweep["speedup"]
    highest = 1.06 * max(ratio.max(), sweep["speedup_high"].max())
    look = {"color": figures.MUTED, "linestyle": "--", "label": "ideal: time follows FLOPs"}
    axis.plot([1, highest], [1, highest], **look)
    axis.axhline(1, color=COLOURS["DeiT"], linewidth=1.2, label="DeiT")
    look = {"color": COLOURS["A-ViT packed"], "label": "A-ViT packed, synthetic halting"}
    spread = [speedup - sweep["speedup_low"], sweep["speedup_high"] - speedup]
    axis.errorbar(ratio, speedup, spread, fmt="o-", ecolor=figures.INK, capsize=4, **look)
    axis.set_xlabel("FLOPs of DeiT / FLOPs of A-ViT (beside the points: mean depth in layers)")
    lowest = min(0.8, 0.7 * sweep["speedup_low"].min())
    axis.set(ylabel="images/s, A-ViT / DeiT", ylim=(lowest, highest))
    figures.legend_above(figure, axis)
    points = sweep[["flops_ratio", "speedup"]].to_numpy()
    words = [f"{depth:g}" for depth in sweep["mean_depth"]]
    notes = [(word, point, figures.INK) for word, point in zip(words, points, strict=True)]
    figures.label_points(figure, axis, notes, points)
    return figure


def draw_layers(table: pd.DataFrame) -> Figure:
    """Time of every layer, DeiT's and packed A-ViT's, and the tokens that are left in it."""
    figure, [[axis]] = figures.subplots(height=3.4)
    for offset, column, label in ((-0.19, "deit", "DeiT"), (0.19, "packed", "A-ViT packed")):
        look = {"color": COLOURS[label], "label": label}
        axis.bar(table["layer"] + offset, table[column], 0.38, **look)
    look = {"color": figures.INK, "label": "mean of DeiT x share of tokens left"}
    axis.plot(table["layer"], table["ideal"], "_", markersize=14, mew=2, **look)
    axis.set_xlabel("layer, and below it the tokens of an image that are left in it")
    axis.set_ylabel("time [ms per image]")
    ticks = [f"{row.layer}\n{row.tokens:.0f}" for row in table.itertuples()]
    axis.set_xticks(table["layer"], ticks)
    axis.grid(axis="x", visible=False)
    return figures.legend_above(figure, axis)


# --- the command line -----------------------------------------------------------------------------


def read_plan(arguments: Sequence[str] | None = None) -> Plan:
    """The plan that the options name."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="avit_tiny_patch16_224", help="a timm name avit_*")
    add("--depth", type=float, default=7.0, help="mean depth in layers")
    add("--batch", type=int, nargs="+", default=[1, 8, 64, 256], help="batch sizes in images")
    add("--task", nargs="+", choices=TASKS, default=TASKS, help="what to time")
    add("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="in which precision")
    add("--repeats", type=int, default=5, help="rounds of each timing")
    add("--seed", type=int, default=0, help="seed of weights and halting")
    add("--device", default="auto", help="auto, cpu, gpu")
    given = parser.parse_args(arguments)
    return Plan(
        model=given.model,
        depth=given.depth,
        batches=given.batch,
        tasks=given.task,
        precisions=given.precision,
        repeats=given.repeats,
        seed=given.seed,
        device=pick_device(given.device),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    try:
        speeds = run_benchmark(read_plan(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(speeds.to_string(index=False, float_format="{:.4g}".format))
    return 0


if __name__ == "__main__":
    sys.exit(main())
