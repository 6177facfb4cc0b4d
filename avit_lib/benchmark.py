"""The benchmark as a whole: what is measured, and the tables and figures that it leaves in results/benchmark."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import timm
import torch

from avit_lib import efficiency, plots
from avit_lib.config import StudyError, get_profile
from avit_lib.reporting import Collection, Results, hardware, write_summary
from avit_lib.training import training_hours

COLLECTION = Collection(
    name="benchmark",
    purpose="DeiT, masked A-ViT and packed A-ViT side by side: interleaved, warmed up, medians and quartiles of rounds",
    command="make benchmark",
    notes=(
        "The halting is synthetic: an untrained model whose patches halt in layers drawn for them, the class token in "
        "the last. Times depend on how many tokens are left where, not on what the weights have learnt.",
        "Ratios are medians of the ratios within each round. Efficiency is speed-up / FLOP ratio; 1 is ideal.",
        "bfloat16 means weights and activations in inference, autocast in training.",
    ),
)
IMAGENET_IMAGES = 1_281_167  # ILSVRC 2012, training
SWEEP = (0.25, 0.4, 0.6, 0.75, 0.9)  # mean depths, as shares of the layers


@dataclass(frozen=True)
class Benchmark:
    """What is measured: a model, a mean depth in layers, batch sizes, tasks and precisions; and how often."""

    model: str
    depth: float
    batches: tuple[int, ...]
    tasks: tuple[str, ...]
    precisions: tuple[str, ...]
    repeats: int
    limit: float
    seed: int = 0

    def __post_init__(self):
        """Raises StudyError for what cannot be measured."""
        if self.model not in timm.list_models("avit_*"):
            raise StudyError(f"no A-ViT is called {self.model!r}; timm.list_models('avit_*') names them")
        if not 1 <= self.depth <= 12:
            raise StudyError(f"the mean depth must lie between 1 and 12 layers, not {self.depth}")
        if min(*self.batches, self.repeats, self.limit) <= 0:
            raise StudyError("batch sizes, repeats and limit must be positive")


def run_benchmark(settings: Benchmark, device: torch.device) -> tuple[pd.DataFrame, Path]:
    """Measure everything and write it down; returns the table of speeds and the page of all results."""
    results = Results(COLLECTION, settings.seed, COLLECTION.command)
    name, depth, repeats, limit = settings.model, settings.depth, settings.repeats, settings.limit
    kind = device.type
    middle = sorted(settings.batches)[len(settings.batches) // 2]
    workload = efficiency.synthetic_workload(name, middle, depth, seed=settings.seed)
    about = f"{name} on {hardware()}; {workload.describe()}."
    single = f"Batch {middle}, inference, float32. {about}"

    speed = efficiency.benchmark_all(
        name, depth, settings.batches, settings.tasks, settings.precisions, repeats, device, limit
    )
    results.table(speed, f"speed_{kind}", f"DeiT, masked and packed A-ViT side by side. {about}")
    results.figure(plots.throughput_by_batch(speed), f"throughput_{kind}", f"Images a second, with quartiles. {about}")
    overhead = efficiency.overhead_table(name, settings.batches, settings.precisions, repeats, device, limit)
    results.table(overhead, f"overhead_{kind}", f"Packed inference when no token halts, as a share above DeiT. {about}")
    depths = [round(share * len(workload.adaptive.blocks), 1) for share in SWEEP]
    sweep = efficiency.depth_sweep(name, depths, middle, repeats, device, limit)
    results.table(sweep, f"depth_sweep_{kind}", f"Packed A-ViT at several mean depths. {single}")
    results.figure(plots.speedup_against_flops(sweep), f"speedup_{kind}", f"Speed-up against FLOPs. {single}")
    workload = efficiency.on_device(workload, device)
    layers = efficiency.layer_times(workload, repeats)
    results.table(layers, f"layers_{kind}", f"Milliseconds an image in each layer. {single}")
    results.figure(plots.layer_times(layers), f"layers_{kind}", f"Time of each layer. {single}")
    if kind == "cpu":
        operators = efficiency.operator_table(workload)
        results.table(operators, "operators_cpu", f"Milliseconds an image in each kind of operator. {single}")
        results.figure(plots.operator_times(operators), "operators_cpu", f"Where the time goes. {single}")
    memory = efficiency.memory_table(name, depth, middle, settings.tasks, settings.precisions, device)
    results.table(memory, f"memory_{kind}", f"Peak memory above weights and images, in MiB. {about}")
    results.table(summary_table(speed, memory), f"summary_{kind}", f"Packed A-ViT against DeiT. {about}")
    if "training" in settings.tasks:
        results.table(cost_table(speed), f"cost_{kind}", f"{COST_CAPTION} {about}")
    return speed, write_summary(COLLECTION)


COST_CAPTION = (
    "Hours of training in the imagenet profile on several devices like this one, at the batch size that is "
    "fastest here, as if they lost nothing by working together; evaluation not counted."
)


def cost_table(speed: pd.DataFrame, devices: Sequence[int] = (1, 4, 8)) -> pd.DataFrame:
    """Hours that the imagenet profile takes, from the images a second of training: a row a model and precision."""
    profile = get_profile("imagenet")
    images = IMAGENET_IMAGES - 1000 * profile.validation_per_class
    training = speed[speed["task"] == "training"]
    rows = []
    for (precision, model), part in training.groupby(["precision", "model"], sort=False):
        fastest = part["images_per_second"].max()
        row = {"model": model, "precision": precision, "images_per_second": fastest}
        for count in devices:
            hours = training_hours(images, profile.runs[0].training.epochs, count * fastest)
            row[f"hours on {count}"] = round(hours, 1)
        rows.append(row)
    return pd.DataFrame(rows)


def summary_table(speed: pd.DataFrame, memory: pd.DataFrame) -> pd.DataFrame:
    """The tables of speed and memory in words, for people: one row a task, precision and batch size."""
    rows = []
    key = ["task", "precision", "batch"]
    peaks = memory.set_index([*key, "model"])["of_deit"]
    for found, part in speed.groupby(key, sort=False):
        part = part.set_index("model")
        packed, share = part.loc["A-ViT packed"], peaks.get((*found, "A-ViT packed"))
        rows.append(dict(zip(key, found, strict=True)) | {
            "DeiT [images/s]": f"{part.loc['DeiT', 'images_per_second']:.1f}",
            "masked [images/s]": f"{part.loc['A-ViT masked', 'images_per_second']:.1f}",
            "packed [images/s]": f"{packed['images_per_second']:.1f}",
            "speed-up": f"{packed['speedup']:.2f}",
            "FLOP ratio": f"{packed['flops_ratio']:.2f}",
            "efficiency": f"{packed['efficiency']:.2f}",
            "peak memory of DeiT's": "" if share is None else f"{share:.0%}",
        })  # fmt: skip
    return pd.DataFrame(rows)
