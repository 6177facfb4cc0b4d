"""Print a model's accuracy on ImageNet: plain, with ToMe, and adapted to as many FLOPs.

    python scripts/imagenet.py --images DIR [--model NAME] [--ckpt FILE]

DIR holds the validation images, one folder a class; or val/ with those, and perhaps train/, on
which thresholds are then set, else on some validation images, without their labels. A model whose
tokens leave already is measured as it is.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from timm.data import resolve_model_data_config
from torch import nn
from torchvision.transforms.v2 import Compose, Normalize

from avit_lib.commands import CALIBRATION, find_model
from avit_lib.data import IMAGENET_CLASSES, Images, to_pixels
from avit_lib.data.datasets import imagenet_images
from avit_lib.data.images import CROP_FRACTION
from avit_lib.errors import UserError
from avit_lib.evaluation import predict
from avit_lib.report import tables
from avit_lib.study import get_profile
from avit_lib.study.results import to_markdown
from avit_lib.training import pick_device


def open_folder(model: nn.Module, folder: Path) -> Images:
    """The images of a folder, one folder a class, normalised as a model of timm's wants them.

    Raises UserError for a model that was trained to see another part of them.
    """
    images = imagenet_images(folder, model.patch_embed.img_size[0])
    config = resolve_model_data_config(model)
    if config["crop_pct"] != CROP_FRACTION:
        raise UserError(
            f"this model sees the middle {config['crop_pct']:.0%} of an image, and here it would "
            f"see {CROP_FRACTION:.0%}; name another model"
        )
    steps = [images.transform, to_pixels, Normalize(config["mean"], config["std"])]
    return replace(images, transform=Compose(steps))


def compare(
    model: nn.Module, folder: Path, seed: int, device: torch.device, batch_size: int
) -> pd.DataFrame:
    """Accuracy and GFLOPs of a model, its rivals and what is published, a row each.

    Raises UserError unless the images and the model are of 1,000 classes.
    """
    val, train = folder / "val", folder / "train"
    tested = open_folder(model, val if val.is_dir() else folder)
    if not len(tested.classes) == model.num_classes == IMAGENET_CLASSES:
        raise UserError(
            f"{folder} has {len(tested.classes)} classes, the model {model.num_classes}; "
            f"ImageNet has {IMAGENET_CLASSES:,}, one folder each"
        )
    if hasattr(model, "forward_with_trace"):
        models = {"as in the file": model}
    else:
        source = open_folder(model, train) if train.is_dir() else tested
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
        images = source[order[:CALIBRATION]][0].to(device)
        merged = tables.merge_both_ways(model, get_profile("imagenet"), images)
        models = {"plain": model} | merged
    rows = []
    for name, one in models.items():
        found = predict(one, tested, batch_size, device)
        accuracy, gflops = found.correct.float().mean().item(), found.flops.mean().item() / 1e9
        rows.append({"model": name, "accuracy": accuracy, "gflops": gflops, "images": len(tested)})
    for known in tables.IMAGENET:
        what = f"published, {known['backbone']}: {known['method']}"
        words = f"{what}, {known['training']} ({known['source']})"
        figures = {name: known.get(name) for name in ("accuracy", "gflops")}
        rows.append({"model": words} | figures)
    return pd.DataFrame(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder with the images")
    parser.add_argument("--model", help="timm name (default: deit_tiny_patch16_224)")
    parser.add_argument("--ckpt", type=Path, help="its .safetensors or .pth (default: timm's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="cpu, gpu or auto")
    parser.add_argument("--batch-size", type=int, default=250)
    options = parser.parse_args(arguments)
    try:
        device = pick_device(options.device)
        model = find_model(options.model, options.ckpt)[0].to(device)
        chosen = options.images, options.seed, device, options.batch_size
        print(to_markdown(compare(model, *chosen)))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
