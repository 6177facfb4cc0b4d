"""On a CUDA GPU: are packed results right in half precision, and what is faster?

    python scripts/gpu_benchmark.py [--seed 0] [--device gpu]

Prints two tables, and writes them to results/benchmark. Attention on images of different lengths is
padded to the longest, or one ragged kernel ("varlen"), which packed execution takes by itself in
half precision. Of the DeiTs only DeiT-T has its ImageNet weights.
"""

import argparse
import sys
from collections.abc import Sequence
from copy import deepcopy

import benchmark
import pandas as pd
import torch
from benchmark import Models, Rivals, Size
from torch import Tensor, nn

from avit_lib.errors import UserError
from avit_lib.study.results import Results, hardware, to_markdown
from avit_lib.training import pick_device

WIDTHS = {"DeiT-T": "tiny", "DeiT-S": "small", "DeiT-B": "base"}
SIZES = [
    Size(f"{label}, 224", f"{width}_patch16_224", 224, {1: 11, 64: 11, 256: 11}, photographs=256)
    for label, width in WIDTHS.items()
]
METHODS = {  # by what they are in the other benchmark
    "DeiT": "DeiT",
    "A-ViT masked": "A-ViT masked",
    "A-ViT padded": "A-ViT padded",
    "A-ViT varlen": "A-ViT packed",
    "ToMe": "ToMe",
    "Adaptive merging, padded": "Adaptive merging",
    "Adaptive merging, varlen": "Adaptive merging",
}


def cast(models: Models, precision: torch.dtype) -> dict[str, nn.Module]:
    """Copies of the methods in another precision."""
    copies = deepcopy({name: models[source] for name, source in METHODS.items()})
    return {name: model.to(precision) for name, model in copies.items()}


def compute(name: str, model: nn.Module, images: Tensor) -> Tensor:
    """Logits [B, K] by the method called ``name``."""
    model.execution = benchmark.EXECUTIONS.get(name, "packed")
    run = benchmark.pad(model) if name.endswith("padded") else model
    return run(images)


@torch.inference_mode()
def compare_logits(rivals: Rivals) -> pd.DataFrame:
    """How far logits in half precision are from what they should be: a row a precision and method.

    same_class is the share of images of which both say the same class.
    """
    rows, images = [], rivals.largest
    for precision in (torch.bfloat16, torch.float16):
        models, half = cast(rivals.models, precision), images.to(precision)
        masked = compute("A-ViT masked", models["A-ViT masked"], half)
        for name, model in models.items():
            if name in ("A-ViT padded", "A-ViT varlen"):
                against, expected = "A-ViT masked", masked
            else:
                against, expected = "float32", compute(name, rivals.models[METHODS[name]], images)
            found = compute(name, model, half)
            row = {
                "precision": str(precision).removeprefix("torch."),
                "model": name,
                "against": against,
                "images": len(images),
                "max_difference": (found.float() - expected.float()).abs().max().item(),
                "same_class": (found.argmax(1) == expected.argmax(1)).float().mean().item(),
            }
            rows.append(row)
    return pd.DataFrame(rows)


def time_size(rivals: Rivals) -> pd.DataFrame:
    """Speeds of all methods in one size, in float16."""
    models, images = cast(rivals.models, torch.float16), rivals.images.half()
    table = benchmark.time_models(models, images, rivals.size.rounds)
    return pd.DataFrame({"size": rivals.size.label, **table})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="draws photographs and weights")
    parser.add_argument("--device", default="gpu", choices=("gpu", "cpu"), help="cpu: for a test")
    given = parser.parse_args(arguments)
    try:
        device = pick_device(given.device)
        results = Results("benchmark", given.seed, "gpu_benchmark")
        torch.backends.cudnn.allow_tf32 = False  # float32 is what others are compared with

        def write(table: pd.DataFrame, name: str, caption: str) -> None:
            caption = f"{caption}. Photographs, on {hardware()}."
            print(f"{caption}\n\n{to_markdown(results.table(table, name, caption))}\n", flush=True)

        tables = []
        for size in SIZES:
            rivals = benchmark.prepare(size, given.seed, device)
            if not tables:
                caption = f"Logits in half precision, {size.label}"
                write(compare_logits(rivals), "gpu_exactness", caption)
            tables.append(time_size(rivals))
        caption = "Inference in float16, images a second with quartiles"
        write(pd.concat(tables, ignore_index=True), "gpu_speed", caption)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
