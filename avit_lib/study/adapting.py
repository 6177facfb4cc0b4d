"""Trained models of timm's made adaptive from the command line, and measured on ImageNet beside
their peers.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize
from tqdm.auto import tqdm

from avit_lib.adaptive import Adaptive, adapt, without_thresholds
from avit_lib.data import STATISTICS, find_images, loader, read_all, read_image, to_pixels
from avit_lib.data.datasets import folder_images
from avit_lib.errors import UserError, fitting_memory
from avit_lib.evaluation import counted_flops, flops_per_image
from avit_lib.peers.tome import TokenMerging
from avit_lib.study.results import provenance
from avit_lib.study.tables import ADAPTED, IMAGENET, adapted_like
from avit_lib.training import (
    count_classes,
    create_model,
    load_checkpoint,
    load_pretrained,
    load_weights,
    save_checkpoint,
)

CALIBRATION = 512  # images on which thresholds are set, at most
PEERS = (8, 13, 16)  # r of ToMe, beside which an adapted model is measured
CLASSES = 1000  # of ImageNet


def trained_model(name: str, weights: Path | None) -> tuple[nn.Module, dict[str, Any]]:
    """A trained model and what ``save_checkpoint`` says of it: one that fit wrote, else timm's
    ``name``.

    ``weights``: a .safetensors or .pth of timm's keys, for as many classes as it has; or of fit,
    with its .json; default: the pretrained ones of ``name``.
    """
    if weights and weights.with_suffix(".json").is_file():
        model, found = load_checkpoint(weights)
        run = found.get("run", {"classes": []})
        return model, {"name": found["model"], "arguments": found["arguments"], "run": run}
    classes = count_classes(weights) if weights else None
    arguments = {"num_classes": classes} if classes else {}
    model = create_model(name, arguments)
    described = {"name": name, "arguments": arguments, "run": {"classes": []}}
    without_thresholds(model)  # or an error, before anything is downloaded
    if weights:
        load_weights(model, weights)
    else:
        tag = timm.get_pretrained_cfg(name).tag
        load_pretrained(model, name if "." in name or not tag else f"{name}.{tag}")
    return model.eval(), described


def reader(model: nn.Module, run: dict[str, Any]) -> tuple[Callable[[Path], Tensor], tuple]:
    """What reads an image file as ``model`` wants it; and the mean and deviation used."""
    size = model.patch_embed.img_size[0]
    if run["classes"]:
        return partial(read_image, image_size=size), STATISTICS
    config = resolve_model_data_config(model)
    config["input_size"] = (3, *model.patch_embed.img_size)  # the model may be made for another
    transform = create_transform(**config)
    return partial(read_image, image_size=size, transform=transform), (
        config["mean"],
        config["std"],
    )


def titles(names: list[str], logits: Tensor, depth: Tensor, classes: list[str]) -> list[str]:
    """Above each image: name, prediction (of ``classes``, else of ImageNet), mean depth; logits [B,
    K].
    """
    if not classes:
        known = (
            ImageNetInfo().index_to_description if logits.shape[1] == CLASSES else "class {}".format
        )
        classes = [known(index).split(",")[0] for index in range(logits.shape[1])]
    means = depth.float().mean(dim=1).tolist()
    above = zip(names, (classes[index] for index in logits.argmax(dim=1)), means, strict=True)
    return [f"{name}\npredicted: {word}\nmean depth {mean:.1f}" for name, word, mean in above]


def adapt_files(
    model: nn.Module,
    described: dict[str, Any],
    images: Path,
    saved: float,
    output: Path,
    seed: int,
    device: torch.device,
) -> Adaptive:
    """``adaptive.adapt`` on at most ``CALIBRATION`` image files in or below ``images``; writes
    ``output``.
    """
    if output.suffix != ".safetensors":
        raise UserError(f"--output must end in .safetensors, not {output.name!r}")
    if not images.is_dir():
        raise UserError(
            f"{images} is no folder; name one with some hundred images, which need no labels"
        )
    files, _ = find_images(images)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    read = reader(model, described["run"])[0]
    pixels = read_all(read, [images / files[number] for number in order.tolist()], "reading")
    if len(pixels) < 2:
        raise UserError(
            f"{images} holds {len(pixels)} images; thresholds are set on two or more, better some hundred"
        )
    with fitting_memory(len(pixels), "name a folder with fewer images"):
        adaptive = adapt(model.to(device), torch.stack(pixels).to(device), saved, report=_tell)
    facts = {"saved": saved, "images": len(pixels), "provenance": provenance("", seed)}
    arguments = described["name"], described["arguments"]
    save_checkpoint(
        output, adaptive, *arguments, run={"seed": seed} | described["run"], adapted=facts
    )
    return adaptive


def _tell(share: float) -> None:
    print(f"these thresholds save {share:.1%} of the FLOPs", flush=True)


@torch.inference_mode()
def imagenet_table(
    model: nn.Module, folder: Path, seed: int, device: torch.device, batch_size: int
) -> pd.DataFrame:
    """A trained ``model`` on the validation images of ImageNet: plain, ToMe, and adapted to as many
    FLOPs as ToMe.

    ``folder`` holds one folder a class, or val/ with those, beside which thresholds are set on
    train/, if it is there; else on ``CALIBRATION`` of the validation images, without their labels.
    An ``Adaptive`` model is measured as it is. Raises UserError unless there are 1,000 classes.
    """
    model, config = model.to(device), resolve_model_data_config(model)
    size = model.patch_embed.img_size[0]

    def as_wanted(images: Tensor) -> Tensor:
        return normalize(to_pixels(images), config["mean"], config["std"]).to(device)

    val, train = folder / "val", folder / "train"
    data = folder_images(val if val.is_dir() else folder, size)
    if len(data.classes) != CLASSES or model.num_classes != CLASSES:
        counts = (
            f"{data.images.root} has {len(data.classes)} classes, the model {model.num_classes}"
        )
        raise UserError(f"{counts}; ImageNet has {CLASSES:,}, one folder each")
    if isinstance(model, Adaptive):
        models = {f"{ADAPTED}, as in the file": model}
    else:
        source = folder_images(train, size) if train.is_dir() else data
        chosen = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[
            :CALIBRATION
        ]
        pixels = as_wanted(source[chosen][0])
        models = {"plain": model} | {f"ToMe, r = {r}": TokenMerging(model, r) for r in PEERS}
        models |= adapted_like(model, [models[f"ToMe, r = {r}"] for r in PEERS], pixels)
    right, flops = dict.fromkeys(models, 0), {}
    with fitting_memory(batch_size, "lower --batch-size"):
        for images, labels in tqdm(
            loader(data, batch_size), desc="testing", unit="batch", disable=None
        ):
            images = as_wanted(images)
            for name, one in models.items():
                if isinstance(one, Adaptive):
                    logits, trace = one.forward_with_trace(images)
                    spent = flops_per_image(one, trace.depth.cpu()).sum().item() / len(data)
                    flops[name] = flops.get(name, 0.0) + spent
                else:
                    logits = one(images)
                    flops[name] = flops.get(name) or counted_flops(
                        one, images[:1]
                    )  # the same for every image
                right[name] += int((logits.argmax(dim=1).cpu() == labels).sum())
    own = [
        {"model": name, "accuracy": right[name] / len(data), "gflops": flops[name] / 1e9}
        for name in models
    ]
    return pd.DataFrame([*own, *IMAGENET]).assign(
        images=[len(data)] * len(own) + [None] * len(IMAGENET)
    )
