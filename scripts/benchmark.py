"""Time DeiT, A-ViT, ToMe and adaptive merging side by side; write it to results/benchmark.

    python scripts/benchmark.py [--seed 0] [--device auto]

All save about ``SAVED`` of DeiT's FLOPs on the embedded photographs: halting is fitted
(``starts.fit_start``), thresholds are set, ToMe's r is chosen. DeiT-T has its ImageNet weights, the
other sizes are untrained: times depend on how many tokens are left where, not on what they mean.
"""

import argparse
import gc
import multiprocessing
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import msgspec
import pandas as pd
import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from avit_lib import packed
from avit_lib.adaptive import adapt, without_thresholds
from avit_lib.data.datasets import official_images
from avit_lib.errors import UserError
from avit_lib.evaluation import speed
from avit_lib.evaluation.allocator import buffers_kept
from avit_lib.evaluation.speed import Step, infer
from avit_lib.flops import MergingTrace, flops_of, plain_flops, trace_model
from avit_lib.losses import AdaptiveLoss, TaskLoss, target_distribution
from avit_lib.packed import Layout
from avit_lib.peers import make_peers
from avit_lib.report import figures
from avit_lib.starts import fit_start
from avit_lib.study import get_profile
from avit_lib.study.results import Results, hardware, to_markdown
from avit_lib.training import load_pretrained, pick_device

Models = Mapping[str, nn.Module]  # by the name of the method, DeiT first
Decorator = Callable[[Step], Step]


class Size(NamedTuple):
    """A shape of DeiT, and how it is timed."""

    label: str
    model: str  # of timm's, without deit_ or avit_
    pixels: int
    rounds: Mapping[int, int]  # of each batch size
    photographs: int = 128  # on which halting is fitted and thresholds are set; the first are timed


SIZES = (  # what is not timed for every size is for the first
    Size("DeiT-T, 224", "tiny_patch16_224", 224, {1: 21, 8: 21, 64: 11}),
    Size("DeiT-S, 224", "small_patch16_224", 224, {1: 7, 8: 7, 64: 5}),
    Size("DeiT-T, 384", "tiny_patch16_224", 384, {1: 7, 8: 7, 64: 5}),
    Size("DeiT-B, 224", "base_patch16_224", 224, {1: 5, 8: 5}, photographs=32),
)
PRETRAINED = "tiny_patch16_224"  # the model whose weights are embedded
SAVED = 0.4  # share of FLOPs
DEPTH, SPREAD = 0.75, 0.5  # of the target of halting, in parts of the layers: saves as much
SINGLE = 8  # images of a sample, at least: how many tokens are left differs from one to another
LOOKS = {  # marker and line
    "A-ViT masked": ("v", ":"),
    "A-ViT padded": ("s", "--"),
    "A-ViT packed": ("o", "-"),
    "ToMe": ("s", "-"),
    "ToMe in every second layer": ("D", "--"),
    "Adaptive merging": ("P", "-"),
}
EXECUTIONS = {"A-ViT masked": "masked"}  # all others: packed
TRAINED = ("DeiT", "A-ViT masked", "A-ViT packed")
MEASURED = (*TRAINED, "Adaptive merging")  # memory
ACCOUNTED = ("DeiT", "A-ViT packed", "Adaptive merging")
PRECISIONS = ("float32", "bfloat16")
TRAINING_ROUNDS, PROFILED = 5, 3
IMAGENET_IMAGES = 1_281_167  # ILSVRC 2012, training
COST_CAPTION = (
    "Hours of one training of the imagenet profile on several devices like this one, as if they "
    "lost nothing by working together. Not counted: loading images, evaluation, and the forward "
    "pass of the teacher that most of its runs have."
)


class Rivals(NamedTuple):
    """The methods in one size, and photographs."""

    size: Size
    models: Models
    images: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest batch."""
        return self.images[: max(self.size.rounds)]


def run_benchmark(seed: int, device: torch.device) -> pd.DataFrame:
    """Measure everything and write it down; returns the summary."""
    kind = device.type
    results = Results("benchmark", seed, f"benchmark_{kind}")
    rivals, where = prepare(SIZES[0], seed, device), f"Photographs, on {hardware()}."
    about = f"{rivals.size.label}. {where}"

    def write(table: pd.DataFrame, name: str, caption: str) -> pd.DataFrame:
        print(f"{name}: done", flush=True)
        return results.table(table, f"{name}_{kind}", caption)

    def write_speeds(parts: list[pd.DataFrame]) -> pd.DataFrame:
        speeds = pd.concat(parts, ignore_index=True)
        write(speeds, "speed", f"Inference in float32, images a second with quartiles. {where}")
        caption = f"Speed-up over DeiT by batch size, with quartiles of images a second. {where}"
        results.figure(draw_speedup(speeds), f"speedup_{kind}", caption)
        caption = f"Speed-up over DeiT in inference and, in brackets, efficiency. {where}"
        return write(summarise(speeds), "summary", caption)

    first = time_size(rivals)
    summary = write_speeds([first])
    operators = count_operators(rivals, first)
    write(operators, "operators", f"Operators of torch in a forward pass, and its time. {about}")
    caption = "The operators of torch with the most CPU time of their own in a forward pass, by "
    caption += f"its profiler, which adds to each; share: of all operators' time. {about}"
    write(account_operators(rivals), "account", caption)
    caption = f"Time of inference above DeiT's when no token halts or merges. {about}"
    write(time_overhead(rivals), "overhead", caption)

    avit = rivals.models["A-ViT packed"]
    depth = trace_model(avit, rivals.largest)[1].depth.double().mean().item()
    halting = f"A-ViT's mean depth is {depth:.2f} of {len(avit.blocks)} layers. {about}"
    caption = f"Training: forward, backward and AdamW; bfloat16 is autocast. {halting}"
    training = write(time_training(rivals), "training", caption)
    write(estimate_cost(training), "cost", f"{COST_CAPTION} {halting}")
    caption = f"Peak memory above weights and images, in MiB. {halting}"
    write(measure_memory(rivals), "memory", caption)

    parts = [first]
    for size in SIZES[1:]:  # the largest last: what is measured is kept if it is stopped
        parts.append(time_size(prepare(size, seed, device)))
        summary = write_speeds(parts)
    return summary


# --- models and photographs -----------------------------------------------------------------------


def prepare(size: Size, seed: int, device: torch.device) -> Rivals:
    """The methods in one size, all on the weights of one DeiT, and photographs."""
    torch.manual_seed(seed)
    images = take_photographs(size, seed).to(device)
    plain = timm.create_model(f"deit_{size.model}", img_size=size.pixels)
    if size.model == PRETRAINED:
        load_pretrained(plain, f"deit_{size.model}.fb_in1k")
    avit = timm.create_model(f"avit_{size.model}", img_size=size.pixels, gamma=5.0, beta=-2.5)
    avit.load_state_dict(plain.state_dict())
    plain, avit = plain.to(device).eval(), avit.to(device).eval()
    layers = len(avit.blocks)
    fit_start(avit, images, target_distribution(DEPTH * layers, SPREAD * layers, layers))
    models = {"DeiT": plain}
    models |= dict.fromkeys(("A-ViT masked", "A-ViT padded", "A-ViT packed"), avit)
    models |= {name: choose_peer(name, plain) for name in get_profile("caltech24").peers}
    models["Adaptive merging"] = adapt(plain, images, SAVED)
    gc.freeze()  # what is there need not be looked through before each timing
    return Rivals(size, models, images)


def take_photographs(size: Size, seed: int) -> Tensor:
    """Photographs of all embedded classes, drawn by the seed."""
    settings = msgspec.structs.replace(get_profile("caltech24").data, image_size=size.pixels)
    pool = official_images(settings, train=True)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return pool[order[: size.photographs]][0]


def choose_peer(name: str, plain: nn.Module) -> nn.Module:
    """The peer called ``name`` whose r saves about ``SAVED`` of the FLOPs."""
    count = plain.patch_embed.num_patches + plain.num_prefix_tokens
    wish, trace = (1 - SAVED) * plain_flops(plain, count), MergingTrace(torch.zeros(1, count))
    peers = make_peers(plain, {name: range(count // 2)})
    return min(peers.values(), key=lambda peer: abs(peer.flops_of(trace).item() - wish))


@torch.inference_mode()
def count_flops(models: Models, images: Tensor) -> dict[str, Tensor]:
    """FLOPs [B] of each method on these images, padding left out."""
    found = {one: flops_of(one, trace_model(one, images)[1]) for one in {*models.values()}}
    flops = {name: found[model] for name, model in models.items()}
    return flops | {"A-ViT masked": flops["DeiT"]}  # it computes every token


# --- steps ----------------------------------------------------------------------------------------


def attend_padded(qkv: Tensor, layout: Layout, dropout: float, bias: Tensor | None) -> Tensor:
    """As ``packed.attend``, in one call: images are padded to the longest."""
    lengths = list(layout.lengths)
    table = pad_sequence(qkv.split(lengths), batch_first=True)  # [images, longest, 3, heads, d]
    bias = qkv.new_zeros(len(qkv)) if bias is None else bias.to(qkv.dtype)
    mask = pad_sequence(bias.split(lengths), batch_first=True, padding_value=-torch.inf)
    query, key, value = table.permute(2, 0, 3, 1, 4)  # [images, heads, longest, d]
    output = F.scaled_dot_product_attention(query, key, value, mask[:, None, None], dropout)
    return output.transpose(1, 2).flatten(2)[mask.isfinite()]


# Makes steps that attend like this.
pad: Decorator = patch.object(packed, "attend", attend_padded)


def make_step(name: str, model: nn.Module, batches: Sequence[Tensor]) -> Step:
    """Inference by the method called ``name``, of one batch after another."""
    steps = [infer(model, images, EXECUTIONS.get(name, "packed")) for images in batches]

    def step() -> None:
        for one in steps:
            one()

    return pad(step) if name.endswith("padded") else step


def make_training_step(name: str, model: nn.Module, images: Tensor, precision: str) -> Step:
    """Forward, backward and AdamW of one of ``TRAINED``."""
    labels = torch.arange(len(images), device=images.device) % model.num_classes
    loss = TaskLoss() if name == "DeiT" else AdaptiveLoss()
    # It steps, but changes nothing.
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.0, weight_decay=0.0)

    def train() -> None:
        model.execution = EXECUTIONS.get(name, "packed")
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            total = loss(model, images, labels).total
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    return train


def split_images(images: Tensor, batch: int) -> Sequence[Tensor]:
    """The batches of a sample: one, or so many small ones as hold ``SINGLE`` images together."""
    return images[: batch * max(1, SINGLE // batch)].split(batch)


# --- measurements ---------------------------------------------------------------------------------


def time_models(models: Models, images: Tensor, rounds: Mapping[int, int]) -> pd.DataFrame:
    """``compare`` of the models at each batch size, and FLOPs: a row a batch size and model.

    flops_ratio is DeiT's to the model's on the very images timed, efficiency = speedup /
    flops_ratio.
    """
    flops, tables = count_flops(models, images[: max(SINGLE, *rounds)]), []
    for batch, number in rounds.items():
        batches = split_images(images, batch)
        steps = {name: make_step(name, model, batches) for name, model in models.items()}
        count = sum(map(len, batches))
        done = pd.Series({name: each[:count].mean().item() for name, each in flops.items()})
        table = speed.compare(steps, count, number).assign(batch=batch)
        ratio = table["model"].map(done["DeiT"] / done)
        tables.append(table.assign(flops_ratio=ratio, efficiency=table["speedup"] / ratio))
    return pd.concat(tables, ignore_index=True)


def time_size(rivals: Rivals) -> pd.DataFrame:
    """Speeds of all methods in one size."""
    table = time_models(rivals.models, rivals.images, rivals.size.rounds)
    print(f"speed of {rivals.size.label}: done", flush=True)
    return pd.DataFrame({"size": rivals.size.label, **table})


def time_overhead(rivals: Rivals) -> pd.DataFrame:
    """What inference costs when nothing is saved.

    Where no layer merges nothing is scored, and the model is DeiT: so far errs the measurement.
    """
    models = deepcopy(rivals.models)
    avit, merging = models["A-ViT packed"], models["Adaptive merging"]
    avit.beta = -1e4
    merging.thresholds = merging.thresholds.clamp(min=1e4)
    still = {
        "DeiT": models["DeiT"],
        "A-ViT packed": avit,
        "Adaptive merging, thresholds out of reach": merging,
        "Adaptive merging, thresholds infinite": without_thresholds(models["DeiT"]),
    }
    table = time_models(still, rivals.images, rivals.size.rounds)
    table["overhead"] = 1 / table["speedup"] - 1
    return table.drop(columns=["speedup", "flops_ratio", "efficiency"])


class CountOperators(TorchDispatchMode):
    """Counts torch's operators, views among them, once compound ones are taken apart."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def count_operators(rivals: Rivals, speeds: pd.DataFrame) -> pd.DataFrame:
    """How many operators a forward pass calls, and the milliseconds that it takes by ``speeds``."""
    rows = []
    for row in speeds.itertuples():
        batches = split_images(rivals.images, row.batch)
        with CountOperators() as counter:
            make_step(row.model, rivals.models[row.model], batches)()
        found = {"model": row.model, "batch": row.batch, "operators": counter.count / len(batches)}
        rows.append(found | {"milliseconds": 1e3 * row.batch / row.images_per_second})
    return pd.DataFrame(rows)


@buffers_kept()
def account_operators(rivals: Rivals) -> pd.DataFrame:
    """The ten operators of a forward pass with the most CPU time of their own."""
    tables = []
    for name, batch in product(ACCOUNTED, rivals.size.rounds):
        batches = split_images(rivals.images, batch)
        step = make_step(name, rivals.models[name], batches)
        step()
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
            for _ in range(PROFILED):
                step()
        events = [one for one in recorded.key_averages() if one.key.startswith("aten::")]
        forwards = PROFILED * len(batches)
        table = pd.DataFrame({"operator": [one.key.removeprefix("aten::") for one in events]})
        table["calls"] = [one.count / forwards for one in events]
        table["milliseconds"] = [one.self_cpu_time_total / 1e3 / forwards for one in events]
        table["share"] = table["milliseconds"] / table["milliseconds"].sum()
        largest = table.nlargest(10, "milliseconds")
        tables.append(pd.DataFrame({"model": name, "batch": batch, **largest}))
    return pd.concat(tables, ignore_index=True)


def time_training(rivals: Rivals) -> pd.DataFrame:
    """One training step of the largest batch: a row a precision and model."""
    models, images, tables = deepcopy(rivals.models), rivals.largest, []
    for precision in PRECISIONS:
        steps = {
            name: make_training_step(name, models[name], images, precision) for name in TRAINED
        }
        table = speed.compare(steps, len(images), TRAINING_ROUNDS)
        table["seconds"] = len(images) / table["images_per_second"]
        tables.append(pd.DataFrame({"precision": precision, **table}))
    table = pd.concat(tables, ignore_index=True)
    return table.assign(of_deit=1 / table["speedup"])


def measure_memory(rivals: Rivals) -> pd.DataFrame:
    """Peak MiB of steps above weights and images: a row a task, precision and model."""
    rows, device, images = [], rivals.images.device, rivals.largest.cpu()
    for task, precision, name in product(("inference", "training"), PRECISIONS, MEASURED):
        if task == "inference" or name in TRAINED:
            model = deepcopy(rivals.models[name]).cpu()
            # In a process of its own: what one has once taken it may not give back.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peak = pool.apply(peak_memory, (name, model, images, task, precision, device))
            row = {"task": task, "precision": precision, "batch": len(images), "model": name}
            rows.append(row | {"peak_mib": peak})
    table = pd.DataFrame(rows)
    deit = table.groupby(["task", "precision"])["peak_mib"].transform("first")
    return table.assign(of_deit=table["peak_mib"] / deit)


def peak_memory(
    name: str, model: nn.Module, images: Tensor, task: str, precision: str, device: torch.device
) -> float:
    """Peak MiB of two steps in this process, above what it held before.

    bfloat16: of weights and images in inference, autocast in training.
    """
    half = task == "inference" and precision == "bfloat16"
    to = {"device": device, "dtype": torch.bfloat16 if half else torch.float32}
    model, images = deepcopy(model).to(**to), images.clone().to(**to)
    if task == "training":
        step = make_training_step(name, model, images, precision)
    else:
        step = make_step(name, model, [images])
    gpu = device.type == "cuda"
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


def summarise(speeds: pd.DataFrame) -> pd.DataFrame:
    """The table of speeds in words: a row a size and batch size, a column a method."""
    rows = []
    for (size, batch), part in speeds.groupby(["size", "batch"], sort=False):
        deit, *others = part.itertuples()
        row = {"size": size, "batch": batch, "DeiT [images/s]": f"{deit.images_per_second:.1f}"}
        words = {one.model: f"{one.speedup:.2f} ({one.efficiency:.0%})" for one in others}
        rows.append(row | words)
    return pd.DataFrame(rows)


def estimate_cost(training: pd.DataFrame) -> pd.DataFrame:
    """Hours that the longest run of the imagenet profile takes, from the images/s of training."""
    profile = get_profile("imagenet")
    images = IMAGENET_IMAGES - 1000 * profile.data.validation_per_class
    epochs = max(run.training.epochs for run in profile.runs)
    table = training[["model", "precision", "images_per_second"]]
    hours = images * epochs / table["images_per_second"] / 3600
    return table.assign(**{f"hours on {count}": (hours / count).round(1) for count in (1, 4, 8)})


# --- figures --------------------------------------------------------------------------------------


def draw_speedup(speeds: pd.DataFrame) -> Figure:
    """Speed-up by batch size, a panel a size; in the grey boxes it would be the ratio of FLOPs."""
    panels = list(speeds.groupby("size", sort=False))
    rows, batches = -(-len(panels) // 2), sorted(set(speeds["batch"]))
    shape = rows, min(2, len(panels)), 1 + 2.9 * rows
    figure, axes = figures.subplots(*shape, sharex=True, sharey=True)
    for axis, (size, part) in zip(axes.flat, panels, strict=False):
        ratios = part[part["flops_ratio"] > 1].groupby("batch")["flops_ratio"]
        places = [batches.index(batch) for batch in ratios.min().index]
        look = {"color": figures.MUTED, "alpha": 0.3, "label": "if time followed the FLOPs"}
        axis.bar(places, ratios.max() - ratios.min(), 0.6, ratios.min(), **look)
        by_model = {name: line.set_index("batch") for name, line in part.groupby("model")}
        deit = by_model["DeiT"]["images_per_second"]
        axis.axhline(1, color=figures.model_colour("DeiT"), linewidth=1.2, label="DeiT")
        for number, (name, (marker, line)) in enumerate(LOOKS.items()):
            found = by_model[name]
            x = [batches.index(batch) + 0.05 * (number - 2.5) for batch in found.index]
            look = {"color": figures.model_colour(name), "marker": marker, "linestyle": line}
            axis.plot(x, found["speedup"], label=name, **look)
            ends = [found[f"images_per_second_{end}"] / deit for end in ("low", "high")]
            axis.vlines(x, *ends, color=figures.model_colour(name), linewidth=1.2)
        axis.set_xticks(range(len(batches)), batches)
        axis.set(title=size, xlabel="batch size [images]", ylabel="speed-up over DeiT")
    return figures.legend_above(figure, axes[0, 0])


# --- the command line -----------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="draws photographs and weights")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "gpu"))
    given = parser.parse_args(arguments)
    try:
        print(to_markdown(run_benchmark(given.seed, pick_device(given.device))))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
