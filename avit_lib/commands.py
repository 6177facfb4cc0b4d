"""What each command does, when ``cli`` has looked at its arguments.

``common`` are the options that several commands take, as ``cli`` declares them.
"""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
from msgspec import to_builtins
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Normalize

from avit_lib import adaptive, data, training
from avit_lib.data.datasets import imagenet_images
from avit_lib.errors import UserError, fitting_memory
from avit_lib.evaluation import bootstrap_intervals, metrics, predict
from avit_lib.evaluation.speed import benchmark_model
from avit_lib.peers.tome import TokenMerging
from avit_lib.report import pictures
from avit_lib.report.tables import IMAGENET, adapted_like
from avit_lib.study.reading import checked, lay_over
from avit_lib.study.results import provenance, results_dir, to_markdown
from avit_lib.study.settings import Run, get_profile
from avit_lib.study.study import Study, released
from avit_lib.training import processes

CALIBRATION = 512  # images on which thresholds are set, at most
PEERS = (8, 13, 16)  # r of ToMe, beside which an adapted model is measured on ImageNet
CLASSES = 1000  # of ImageNet
COLUMNS = 6  # images in a row of a picture, and in one for which none are named
KEY = """Images are cropped to their centre and scaled to what the model sees. Depth is the number
of layers that compute a token. Blue covers tokens that left the computation: the earlier, the
bluer; in the last row, those that did not reach the last layer."""


# --- fit, test, data ------------------------------------------------------------------------------


def fit(common, output: Path | None, teacher: Path | None, changes: dict[str, Any]) -> None:
    """Train a run, for the notebooks or, with ``changes`` of its training, into ``output``."""
    study = Study(common.profile, common.seed, device=common.device)
    run, start = study.profile.run(common.model or study.profile.focus), common.ckpt
    if output is None:
        output, history = study.folder(run.name), study.train_chain(run.name)
    else:
        options = (("--ckpt", run.start, start), ("--teacher", run.teacher, teacher))
        for option, needed, given in options:
            if needed and not given:
                raise UserError(
                    f"run {run.name!r} starts or learns from run {needed!r}: "
                    f"name its weights by {option}"
                )
        if teacher and not run.teacher:
            raise UserError(f"run {run.name!r} has no teacher; leave out --teacher")
        tables = lay_over(to_builtins(run), {"training": changes})
        run = checked("these settings", run.name, tables, Run)
        if common.data_dir:
            study.data = data.folder_training_data(common.data_dir, study.profile.data, common.seed)
        history = study.train_into(output, run, start, teacher)
    print(to_markdown(history.tail(1)))
    print(f"checkpoints and history: {output}")


def load_trained(common) -> tuple[nn.Module, dict[str, Any], Path]:
    """The model in a checkpoint, else the run that was trained here or committed.

    Returns it with the description of its run, and where it lies.
    """
    study = Study(common.profile, common.seed, device=common.device)
    run = common.model or study.profile.focus
    path, committed = common.ckpt, released(study.profile.name, run)
    if not path:
        trained = (study.folder(run) / "last.safetensors").is_file()
        path = committed if committed.is_file() and not trained else study.checkpoint(run)
    model, description = training.load_checkpoint(path, study.device)
    found = {"classes": [], "seed": common.seed} | description.get("run", {})
    trained_as = found.get("settings", {}).get("name", run)
    if common.model not in (None, trained_as):
        raise UserError(
            f"{path} was trained as {trained_as}, not {run}; correct --model or leave it out"
        )
    return model, found, path


def find_test_images(common, model: nn.Module, run: dict, decode: bool = True) -> data.Images:
    """The test images of a folder, else of the profile; UserError if of other classes."""
    if common.data_dir:
        size = model.patch_embed.img_size[0]
        return data.folder_test_data(common.data_dir, size, run["classes"], decode)
    found = data.test_data(get_profile(common.profile).data, run["seed"], decode)
    if list(found.classes) != run["classes"]:
        raise UserError(
            f"the model knows other classes than those of the profile {common.profile}; "
            "add --data-dir DIR"
        )
    return found


def test(common, batch_size: int) -> None:
    """Print how good a trained model is on the test images, and write it beside its weights."""
    model, run, path = load_trained(common)
    target = path.with_name(f"{path.stem}_test.json")
    if not run["classes"]:
        raise UserError(f"{path} has ImageNet's classes; test it by --data imagenet --images DIR")
    found = find_test_images(common, model, run)
    predictions = predict(model, found, batch_size, training.pick_device(common.device))
    facts: dict[str, Any] = {"images": len(found), **metrics(predictions)}
    table = to_markdown(pd.DataFrame([facts]))
    facts["intervals"] = bootstrap_intervals(predictions, common.seed)
    print(json.dumps(facts, indent=1))
    if processes.rank() == 0:
        print(table, file=sys.stderr)
        origin = provenance(get_profile(common.profile).name, run["seed"])
        training.write_json(target, facts | {"provenance": origin})
    print(f"written to {target}", file=sys.stderr)


def describe_data(common) -> None:
    """Print what the data of a profile are, and whether they are those on record."""
    profile, place = get_profile(common.profile), data.data_dir()
    if files := data.check_embedded(place):
        print(f"{files} embedded files are as published (SHA256SUMS)")
    found = data.training_data(profile.data, common.seed)
    tested = data.test_data(profile.data, common.seed)
    classes = len(tested.classes)
    print(f"{profile.data.dataset} under {place}: {classes} classes")
    for part, images in (
        ("training", found.train),
        ("validation", found.validation),
        ("test", tested),
    ):
        counts = images.labels.bincount(minlength=classes)
        print(f"  {part}: {len(images)} images, {counts.min()} to {counts.max()} a class")
    print(f"split by seed {common.seed}, sha256 {found.split['sha256']}")
    path = results_dir(profile.name) / "metrics" / "split.json"
    recorded = training.read_json(path) if path.is_file() else {}
    if recorded.get("seed") == common.seed:
        print(f"the same as in {path}, compared by {data.check_split(recorded, found.split)}")


# --- adapt, benchmark, test on ImageNet -----------------------------------------------------------


def find_model(name: str, weights: Path | None) -> tuple[nn.Module, dict[str, Any]]:
    """A trained model and its description: one that fit or adapt wrote, else timm's ``name``.

    ``weights``: of fit or adapt, with the .json beside; or a .safetensors or .pth of timm's keys,
    for as many classes as it has. Default: the pretrained ones of ``name``.
    """
    if weights and weights.with_suffix(".json").is_file():
        return training.load_checkpoint(weights)
    classes = training.count_classes(weights) if weights else None
    arguments = {"num_classes": classes} if classes else {}
    model = training.create_model(name, arguments)
    adaptive.without_thresholds(model)  # or an error, before anything is downloaded
    if weights:
        training.load_weights(model, weights)
    else:
        tag = timm.get_pretrained_cfg(name).tag
        training.load_pretrained(model, name if "." in name or not tag else f"{name}.{tag}")
    return model.eval(), {"model": name, "arguments": arguments}


def make_reader(model: nn.Module, classes: list[str]) -> tuple[Callable[[Path], Tensor], tuple]:
    """What reads an image file as a model wants it; and the mean and deviation used.

    ``classes`` are those of a run of a study; a model of timm's has none of its own.
    """
    size = model.patch_embed.img_size[0]
    if classes:
        return partial(data.read_image, image_size=size), data.STATISTICS
    config = resolve_model_data_config(model)
    config["input_size"] = (3, *model.patch_embed.img_size)  # the model may be made for another
    read = partial(data.read_image, image_size=size, transform=create_transform(**config))
    return read, (config["mean"], config["std"])


def read_some(model: nn.Module, described: dict, folder: Path, seed: int) -> Tensor:
    """At most ``CALIBRATION`` images [B, C, H, W] from the files in or below a folder."""
    files, _ = data.find_images(folder)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:CALIBRATION]
    read, _ = make_reader(model, described.get("run", {}).get("classes", []))
    pixels = data.read_all(read, [folder / files[number] for number in order.tolist()], "reading")
    if len(pixels) < 2:
        raise UserError(
            f"{folder} holds {len(pixels)} images; two or more are needed, better some hundred"
        )
    return torch.stack(pixels)


def make_adaptive(model: nn.Module, images: Tensor, saved: float) -> adaptive.Adaptive:
    """``adaptive.adapt``, which says how far it is."""

    def tell(share: float) -> None:
        print(f"these thresholds save {share:.1%} of the FLOPs", flush=True)

    with fitting_memory(len(images), "name a folder with fewer images"):
        return adaptive.adapt(model, images, saved, report=tell)


def adapt(
    common, images: Path, output: Path, name: str, weights: Path | None, saved: float
) -> None:
    """Write a model to ``output`` that saves a share of its FLOPs."""
    model, described = find_model(name, weights)
    device = training.pick_device(common.device)
    pixels = read_some(model, described, images, common.seed)
    adapted = make_adaptive(model.to(device), pixels.to(device), saved)
    facts = {"saved": saved, "images": len(pixels), "provenance": provenance("", common.seed)}
    run = {"seed": common.seed, "classes": []} | described.get("run", {})
    about = described["model"], described["arguments"]
    training.save_checkpoint(output, adapted, *about, run=run, adapted=facts)
    print(f"written to {output}")


def benchmark(common, name: str, weights: Path | None, saved: float, images: Path | None) -> None:
    """Print what a model gains in speed on this machine, beside the plain one of its shape."""
    model, described = find_model(name, weights)
    device = training.pick_device(common.device)
    folder = images or data.data_dir() / "caltech101"
    pixels = read_some(model, described, folder, common.seed).to(device)
    model.to(device)
    if hasattr(model, "forward_with_trace"):
        twin = described["model"].replace("avit_", "deit_", 1)
        shape = {"img_size": model.patch_embed.img_size, "num_classes": model.num_classes}
        plain = training.create_model(twin, shape).to(device).eval()
    else:
        plain = model
        model = make_adaptive(plain, pixels, saved)
    print(to_markdown(benchmark_model(model, plain, pixels)))


def test_on_imagenet(common, folder: Path, batch_size: int) -> None:
    """Print a model's accuracy on ImageNet: plain, with ToMe, and adapted to as many FLOPs.

    ``folder`` holds one folder a class, or val/ with those, beside which thresholds are set on
    train/, if it is there; else on ``CALIBRATION`` of the validation images, without their labels.
    A model whose tokens leave already is measured as it is. Raises UserError unless there are
    1,000 classes.
    """
    model, _ = find_model(common.model or "deit_tiny_patch16_224", common.ckpt)
    device = training.pick_device(common.device)
    model.to(device)
    val, train = folder / "val", folder / "train"
    tested = open_folder(model, val if val.is_dir() else folder)
    if len(tested.classes) != CLASSES or model.num_classes != CLASSES:
        raise UserError(
            f"{folder} has {len(tested.classes)} classes, the model {model.num_classes}; "
            f"ImageNet has {CLASSES:,}, one folder each"
        )
    if hasattr(model, "forward_with_trace"):
        models = {"as in the file": model}
    else:
        source = open_folder(model, train) if train.is_dir() else tested
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(common.seed))
        images = source[order[:CALIBRATION]][0].to(device)
        peers = {f"ToMe, r = {r}": TokenMerging(model, r) for r in PEERS}
        models = {"plain": model} | peers | adapted_like(model, peers.values(), images)
    rows = []
    for name, one in models.items():
        found = predict(one, tested, batch_size, device)
        accuracy, gflops = found.correct.float().mean().item(), found.flops.mean().item() / 1e9
        rows.append({"model": name, "accuracy": accuracy, "gflops": gflops, "images": len(tested)})
    print(to_markdown(pd.DataFrame([*rows, *IMAGENET])))


def open_folder(model: nn.Module, folder: Path) -> data.Images:
    """The images of a folder, one folder a class, normalised as a model of timm's wants them."""
    images = imagenet_images(folder, model.patch_embed.img_size[0])
    config = resolve_model_data_config(model)
    steps = [images.transform, data.to_pixels, Normalize(config["mean"], config["std"])]
    return replace(images, transform=Compose(steps))


# --- visualize ------------------------------------------------------------------------------------


def visualize(common, output: Path, images: list[str]) -> None:
    """Write a picture of where a model stopped looking, in test images or image files."""
    model, run, _ = load_trained(common)
    classes, numbered = run["classes"], all(name.isdecimal() for name in images)
    if not hasattr(model, "forward_with_trace"):
        raise UserError(
            "a model whose tokens all go through; name a checkpoint of an A-ViT, or of adapt"
        )
    if numbered and not classes:
        raise UserError("this model has no test images of its own; name image files by --images")
    if numbered:
        found, statistics = find_test_images(common, model, run, decode=False), data.STATISTICS
        spread = torch.linspace(0, len(found) - 1, COLUMNS).long()
        numbers = [int(name) for name in images] or spread.tolist()
        if max(numbers) >= len(found):
            raise UserError(
                f"there is no test image {max(numbers)}; the numbers go from 0 to {len(found) - 1}"
            )
        pixels, labels = found[numbers]
        names = [f"true: {classes[label]}" for label in labels]
    else:
        read, statistics = make_reader(model, classes)
        pixels = torch.stack([read(Path(name)) for name in images])
        names = [f"{Path(name).resolve().parent.name}/{Path(name).name}" for name in images]
    with torch.inference_mode():
        logits, trace = model.forward_with_trace(pixels.to(training.pick_device(common.device)))
    classes = classes or name_classes(logits.shape[1])
    said = [f"predicted: {classes[best]}" for best in logits.argmax(dim=1).tolist()]
    means = [f"mean depth {mean:.1f}" for mean in trace.depth.float().mean(dim=1)]
    titles = ["\n".join(lines) for lines in zip(names, said, means, strict=True)]
    patches = trace.depth[:, model.num_prefix_tokens :].cpu()
    figure = pictures.depth_maps(
        data.to_pixels(pixels, statistics),
        nn.functional.pad(patches, (1, 0)),  # as if of a class token
        len(model.blocks),
        titles,
        COLUMNS,
        model.patch_embed.grid_size,
    )
    figure.suptitle(KEY, fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=output.suffix.lower()[1:], dpi=150, bbox_inches="tight")
    training.write_atomically(output, drawn.getvalue())
    print(f"written to {output}")


def name_classes(count: int) -> list[str]:
    """The names of ImageNet's classes, or numbers for so many others."""
    if count != CLASSES:
        return [f"class {index}" for index in range(count)]
    known = ImageNetInfo()
    return [known.index_to_description(index).split(",")[0] for index in range(count)]
