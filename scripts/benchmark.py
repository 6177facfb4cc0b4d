"""The benchmark as a whole: what is measured, and the tables and figures that it leaves in
results/benchmark.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pandas as pd
import timm
import torch
from tqdm.auto import tqdm

from avit_lib.errors import UserError
from avit_lib.evaluation import speed
from avit_lib.evaluation.memory import peak_memory
from avit_lib.study import figures
from avit_lib.study.results import Collection, Results, hardware, write_page
from avit_lib.study.settings import get_profile

COLLECTION = Collection(
    name="benchmark",
    purpose="DeiT, masked A-ViT and packed A-ViT side by side: interleaved, warmed up, medians and quartiles of rounds",
    command="make benchmark",
    notes=(
        "The halting is synthetic: an untrained model whose patches halt in layers drawn for them, the class token in "
        "the last. Times depend on how many tokens are left where, not on what the weights have learnt.",
        "Ratios are ratios of medians over interleaved rounds; in the depth sweep, medians of the ratios within a "
        "round. Efficiency is speed-up / FLOP ratio; 1 is ideal.",
        "bfloat16 means weights and activations in inference, autocast in training.",
    ),
)
IMAGENET_IMAGES = 1_281_167  # ILSVRC 2012, training
SWEEP = (0.25, 0.4, 0.6, 0.75, 0.9)  # mean depths, as shares of the layers


def run_benchmark(
    name: str,
    depth: float,
    batches: Sequence[int],
    tasks: Sequence[str],
    precisions: Sequence[str],
    repeats: int,
    limit: float,
    seed: int,
    device: torch.device,
) -> tuple[pd.DataFrame, Path]:
    """Measure the model ``name`` at a mean depth in layers and write it down; returns the speeds
    and the page of all.

    ``limit`` is in seconds; raises UserError for what cannot be measured.
    """
    if name not in timm.list_models("avit_*"):
        raise UserError(f"no A-ViT is called {name!r}; timm.list_models('avit_*') names them")
    if min(*batches, repeats, limit) <= 0:
        raise UserError("batch sizes, repeats and limit must be positive")
    results = Results(COLLECTION.name, seed, COLLECTION.command)
    kind, timing = device.type, (repeats, device, limit)
    middle = sorted(batches)[len(batches) // 2]
    workload = speed.synthetic_workload(name, middle, depth, seed=seed)
    if not 1 <= depth <= (layers := len(workload.adaptive.blocks)):
        raise UserError(f"the mean depth must lie between 1 and {layers} layers, not {depth}")
    about = f"{name} on {hardware()}; {workload.describe()}."
    single = f"Batch {middle}, inference, float32. {about}"

    speeds, overheads, peaks = [], [], []
    for task, precision, batch in tqdm(
        list(product(tasks, precisions, batches)), desc="benchmark", disable=None
    ):
        measured = speed.benchmark(
            speed.synthetic_workload(name, batch, depth, seed=seed), task, precision, *timing
        )
        tqdm.write(
            f"{task}, {precision}, batch {batch}: packed A-ViT {measured['speedup'].iloc[-1]:.2f} x DeiT"
        )
        speeds.append(measured)
    table = pd.concat(speeds, ignore_index=True)
    results.table(table, f"speed_{kind}", f"DeiT, masked and packed A-ViT side by side. {about}")
    figure = figures.throughput_by_batch(table)
    results.figure(figure, f"throughput_{kind}", f"Images a second, with quartiles. {about}")

    for precision, batch in product(precisions, batches):
        nothing_halts = speed.without_halting(speed.synthetic_workload(name, batch, 1.0, seed=seed))
        packed = speed.benchmark(nothing_halts, "inference", precision, *timing, speed.TIMED).iloc[
            -1
        ]
        overheads.append(
            {"precision": precision, "batch": batch, "overhead": 1 / packed["speedup"] - 1}
        )
    caption = f"Packed inference when no token halts, as a share above DeiT. {about}"
    results.table(pd.DataFrame(overheads), f"overhead_{kind}", caption)

    depths = [round(share * layers, 1) for share in SWEEP]
    sweep = speed.depth_sweep(name, depths, middle, *timing, seed=seed)
    results.table(sweep, f"depth_sweep_{kind}", f"Packed A-ViT at several mean depths. {single}")
    results.figure(
        figures.speedup_against_flops(sweep), f"speedup_{kind}", f"Speed-up against FLOPs. {single}"
    )
    layers = speed.layer_times(speed.prepared(workload, device=device), repeats)
    results.table(layers, f"layers_{kind}", f"Milliseconds an image in each layer. {single}")
    results.figure(figures.layer_times(layers), f"layers_{kind}", f"Time of each layer. {single}")

    for task, precision, model in product(tasks, precisions, speed.MODELS):
        peak = peak_memory(name, model, middle, depth, task, precision, kind == "cuda", seed)
        peaks.append(
            {
                "task": task,
                "precision": precision,
                "batch": middle,
                "model": model,
                "peak_mib": peak,
            }
        )
    memory = pd.DataFrame(peaks)
    memory["of_deit"] = memory["peak_mib"] / memory.groupby(["task", "precision"])[
        "peak_mib"
    ].transform("first")
    results.table(
        memory, f"memory_{kind}", f"Peak memory above weights and images, in MiB. {about}"
    )
    results.table(
        summary_table(table, memory), f"summary_{kind}", f"Packed A-ViT against DeiT. {about}"
    )
    if "training" in tasks:
        results.table(cost_table(table), f"cost_{kind}", f"{COST_CAPTION} {about}")
    return table, write_page(COLLECTION)


COST_CAPTION = (
    "Hours of training in the imagenet profile on several devices like this one, at the batch size that is "
    "fastest here, as if they lost nothing by working together; evaluation not counted."
)


def cost_table(speeds: pd.DataFrame) -> pd.DataFrame:
    """Hours that the imagenet profile takes, from the images/s of training: a row a model and
    precision.
    """
    profile = get_profile("imagenet")
    images = IMAGENET_IMAGES - 1000 * profile.data.validation_per_class
    by_model = speeds.query("task == 'training'").groupby(["model", "precision"], sort=False)
    table = by_model["images_per_second"].max().reset_index()
    hours = images * profile.runs[0].training.epochs / table["images_per_second"] / 3600
    return table.assign(**{f"hours on {count}": (hours / count).round(1) for count in (1, 4, 8)})


def summary_table(speeds: pd.DataFrame, memory: pd.DataFrame) -> pd.DataFrame:
    """The tables of speed and memory in words, for people: one row a task, precision and batch
    size.
    """
    key = ["task", "precision", "batch"]
    deit, masked, packed = (
        speeds[speeds["model"] == model].set_index(key) for model in speed.MODELS
    )
    peaks = memory.query("model == 'A-ViT packed'").set_index(key)
    return pd.DataFrame(
        {
            "DeiT [images/s]": deit["images_per_second"].map("{:.1f}".format),
            "masked [images/s]": masked["images_per_second"].map("{:.1f}".format),
            "packed [images/s]": packed["images_per_second"].map("{:.1f}".format),
            "speed-up": packed["speedup"].map("{:.2f}".format),
            "FLOP ratio": packed["flops_ratio"].map("{:.2f}".format),
            "efficiency": packed["efficiency"].map("{:.2f}".format),
            "peak memory of DeiT's": peaks["of_deit"]
            .map("{:.0%}".format)
            .reindex(packed.index, fill_value=""),
        }
    ).reset_index()
