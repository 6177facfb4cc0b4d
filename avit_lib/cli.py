"""Command line: ``python -m avit_lib {fit,test,visualize,benchmark,data,search,sweep}``."""

import argparse
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from avit_lib import distributed, evaluation, plots
from avit_lib.benchmark import Benchmark, run_benchmark
from avit_lib.checkpoints import load_checkpoint, read_json, write_atomically, write_json
from avit_lib.config import PROFILES, Profile, Run, StudyError, data_dir, get_profile, results_dir
from avit_lib.data import (
    Images,
    TrainingData,
    check_split,
    folder_data,
    folder_training_data,
    read_image,
    test_data,
    test_images,
    to_pixels,
    training_data,
)
from avit_lib.efficiency import PRECISIONS, TASKS
from avit_lib.models import AViT
from avit_lib.reporting import provenance, to_markdown
from avit_lib.search import run_search
from avit_lib.study import Study, describe, train_run
from avit_lib.sweep import run_sweep
from avit_lib.training import pick_device


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 after a fault that the user can mend, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        with distributed.processes():
            options.command(options)
    except StudyError as error:
        print(f"{_speaker()}error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on after the last finished epoch", file=sys.stderr)
        return 130
    return 0


def fit(options: argparse.Namespace) -> None:
    """Train one model and write its checkpoints and history into the output folder, or where the notebooks look."""
    profile, device = get_profile(options.profile), pick_device(options.device)
    run = _configured_run(profile, options)
    if options.output:
        if run.start and not options.ckpt:
            raise StudyError(f"run {run.name!r} starts from the weights of run {run.start!r}: name them by --ckpt")
        data = _training_data(profile, options)
        teacher = _teacher(options, run, list(data.train.classes), device)
        description = describe(run, data, options.ckpt, options.teacher)
        output = options.output
        history = train_run(run, data, output, options.ckpt, description, options.seed, device, teacher)
    else:
        if options.data_dir or options.ckpt or options.teacher or run != profile.run(run.name):
            raise StudyError("data, weights or settings of your own need a folder of their own: add --output DIR")
        study = Study(profile.name, options.seed, device=options.device)
        output = study.folder(run.name)
        history = study.train(run.name)
    print(to_markdown(history.tail(1)))
    print(f"checkpoints and history: {output}")


def test(options: argparse.Namespace) -> None:
    """Evaluate a checkpoint on the test images: a table, and the same as JSON, printed and beside the checkpoint."""
    _check_positive("--batch-size", options.batch_size)
    checkpoint = options.ckpt or _profile_checkpoint(options)
    model, description = load_checkpoint(checkpoint, pick_device(options.device))
    _check_kind(model, options.model, checkpoint)
    data = _test_set(options, test_data, model, description["run"])
    predictions = evaluation.predict(model, data, options.batch_size, pick_device(options.device))
    values = evaluation.metrics(model, predictions)
    intervals = evaluation.bootstrap_intervals(predictions, seed=options.seed)
    target = checkpoint.with_name(f"{checkpoint.stem}_test.json")
    facts = {"images": len(data), **values, "intervals": intervals}
    if distributed.rank() == 0:
        write_json(target, facts | {"provenance": provenance(options.profile, options.seed)})
        print(to_markdown(pd.DataFrame([{"images": len(data)} | values])), file=sys.stderr)
    print(json.dumps(facts, indent=1))
    print(f"written to {target}", file=sys.stderr)


def visualize(options: argparse.Namespace) -> None:
    """Draw images, where the model stopped looking, and what it still saw, into one PNG."""
    checkpoint = options.ckpt or _profile_checkpoint(options)
    model, description = load_checkpoint(checkpoint, pick_device(options.device))
    if not isinstance(model, AViT):
        raise StudyError(f"{checkpoint} is a model that does not halt; name a checkpoint of an A-ViT")
    images, titles = _chosen_images(options, model, description["run"])
    with torch.inference_mode():
        _, trace = model.forward_with_trace(images.to(pick_device(options.device)))
    figure = plots.depth_maps(to_pixels(images), trace.depth.cpu(), len(model.blocks), titles)
    png = io.BytesIO()
    figure.savefig(png, dpi=150, bbox_inches="tight")
    write_atomically(options.output, png.getvalue())
    print(f"written to {options.output}")


def benchmark(options: argparse.Namespace) -> None:
    """Time DeiT, masked and packed A-ViT side by side; tables and figures go into results/benchmark."""
    settings = Benchmark(
        options.model, options.depth, tuple(options.batch), tuple(options.task), tuple(options.precision),
        options.repeats, options.limit, options.seed,
    )  # fmt: skip
    speed, page = run_benchmark(settings, pick_device(options.device))
    print(to_markdown(speed))
    print(f"tables and figures: {page}")


def data(options: argparse.Namespace) -> None:
    """Say where the data of a profile are, read every image, print the split and compare it with the one on record."""
    profile = get_profile(options.profile)
    found = training_data(profile, options.seed)
    split, images, classes = found.split, test_data(profile, options.seed), len(found.train.classes)
    sizes = f"{split['train_images']} training, {split['validation_images']} validation, {len(images)} test"
    print(f"{profile.dataset} under {data_dir()}: {sizes} images, {classes} classes")
    for role, part in (("training", found.train), ("validation", found.validation), ("test", images)):
        counts = part.labels.bincount(minlength=classes)
        print(f"  {role}: {counts.min()} to {counts.max()} images a class")
    print(f"split by seed {options.seed}, sha256 {split['sha256']}")
    path = results_dir(profile.name) / "metrics" / "split.json"
    recorded = read_json(path) if path.is_file() else {}
    if recorded.get("seed") == options.seed and "sha256" in recorded:
        check_split(recorded, split)
        print(f"the same as in {path}")


def search(options: argparse.Namespace) -> None:
    """Train the candidates of a profile and compare them on the validation images."""
    study = Study(options.profile, options.seed, "search", options.device)
    print(to_markdown(run_search(study)))
    print(f"written to {study.results.folder / 'tables' / 'search.csv'}", file=sys.stderr)


def sweep(options: argparse.Namespace) -> None:
    """Train and test runs of a profile from several seeds."""
    print(to_markdown(run_sweep(options.profile, options.seed, options.device)))
    print(f"written to {results_dir(options.profile) / 'tables' / 'sweep.csv'}", file=sys.stderr)


def _speaker() -> str:
    """Which of several processes it is that says something."""
    return f"process {distributed.rank()}: " if distributed.count() > 1 else ""


def _profile_checkpoint(options: argparse.Namespace) -> Path:
    """The checkpoint of the run --model in the profile, of the one the notebooks look into if none is named."""
    study = Study(options.profile, options.seed, device=options.device)
    return study.checkpoint(options.model.lower() if options.model else study.profile.focus)


def _check_kind(model: torch.nn.Module, name: str | None, checkpoint: Path) -> None:
    """Raise StudyError when --model names the other of the two kinds than ``checkpoint`` holds."""
    kind = "AViT" if isinstance(model, AViT) else "DeiT"
    if name and name.lower() in ("avit", "deit") and name.lower() != kind.lower():
        raise StudyError(f"{checkpoint} is of kind {kind}, not {name}; correct --model or leave it out")


def _check_positive(option: str, value: float) -> None:
    """Raise StudyError unless ``value`` is positive; NaN is not."""
    if not value > 0:
        raise StudyError(f"{option} must be positive, not {value}")


def _configured_run(profile: Profile, options: argparse.Namespace) -> Run:
    run = profile.run(options.model.lower())
    changes = {"epochs": options.epochs, "batch_size": options.batch_size, "learning_rate": options.lr}
    changes = {name: value for name, value in changes.items() if value is not None}
    for name, value in changes.items():
        _check_positive("--lr" if name == "learning_rate" else f"--{name.replace('_', '-')}", value)
    return replace(run, training=replace(run.training, **changes))


def _teacher(options: argparse.Namespace, run: Run, classes: list[str], device: torch.device) -> torch.nn.Module | None:
    """The model of --teacher, if the run has one; raises StudyError when only one of the two says so."""
    if not options.teacher:
        if run.teacher:
            raise StudyError(f"run {run.name!r} learns from run {run.teacher!r}: name its weights by --teacher")
        return None
    if not run.teacher:
        raise StudyError(f"run {run.name!r} has no teacher; leave out --teacher")
    teacher, description = load_checkpoint(options.teacher, device)
    if description["run"]["classes"] != classes:
        raise StudyError(f"{options.teacher} was trained for other classes than those of the training images")
    return teacher


def _training_data(profile: Profile, options: argparse.Namespace) -> TrainingData:
    if not options.data_dir:
        return training_data(profile, options.seed)
    size, channels = profile.image_size, profile.channels
    return folder_training_data(options.data_dir, size, channels, options.seed, profile.augmentation)


def _chosen_images(options: argparse.Namespace, model: AViT, run: dict) -> tuple[torch.Tensor, list[str]]:
    """The images named by --images, numbers in the test set or paths, and a title for each."""
    numbers = [name for name in options.images if name.isdigit()]
    if numbers and len(numbers) < len(options.images):
        raise StudyError("--images takes numbers of test images or paths, not both")
    if not numbers:
        images = [read_image(path, _image_size(model), model.in_chans) for path in options.images]
        return torch.stack(images), [Path(path).stem for path in options.images]
    data = _test_set(options, test_images, model, run)
    if (highest := max(int(number) for number in numbers)) >= len(data):
        raise StudyError(f"there is no test image {highest}; the numbers go from 0 to {len(data) - 1}")
    chosen = [data[int(number)] for number in numbers]
    return torch.stack([image for image, _ in chosen]), [run["classes"][label] for _, label in chosen]


def _test_set(
    options: argparse.Namespace, of_profile: Callable[[Profile, int], Images], model: torch.nn.Module, run: dict
) -> Images:
    """The test images under --data-dir, else ``of_profile``; raises StudyError when the model knows other classes."""
    if options.data_dir:
        return folder_data(options.data_dir, "test", _image_size(model), model.in_chans, run["classes"])
    data = of_profile(get_profile(options.profile), run["seed"])
    if list(data.classes) != run["classes"]:
        raise StudyError(
            f"the model was trained for other classes than those of the profile {options.profile}; add --data-dir DIR"
        )
    return data


def _image_size(model: torch.nn.Module) -> int:
    return model.patch_embed.img_size[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m avit_lib", description="Train, test and look into A-ViT.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--profile", default="fashion", help=f"one of {', '.join(PROFILES)} (default: %(default)s)")
    common.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", default="auto", help="cpu, gpu or auto: a GPU if there is one (default: auto)")
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument(
        "--data-dir", type=Path, metavar="DIR",
        help="a folder of your own with train/, test/ and perhaps val/, in each one folder of images a class "
        "(default: the data of the profile)",
    )  # fmt: skip

    trained = argparse.ArgumentParser(add_help=False)
    trained.add_argument(
        "--ckpt", type=Path, metavar="FILE",
        help="a .safetensors that fit wrote, its .json beside it (default: the profile's, of --model)",
    )  # fmt: skip
    trained.add_argument(
        "--model", metavar="NAME",
        help="DeiT, AViT or another run of the profile (default: the one the notebooks look into)",
    )  # fmt: skip

    def add(name: str, function, parents: list, description: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, parents=[common, *parents], help=description, description=description[0].upper() + description[1:]
        )
        command.set_defaults(command=function)
        return command

    command = add("fit", fit, [device, folder], "train a model; the same --output goes on where it stopped")
    command.add_argument(
        "--model",
        default="AViT",
        metavar="NAME",
        help="DeiT, AViT or another run of the profile (default: %(default)s)",
    )
    command.add_argument(
        "--output", type=Path, metavar="DIR",
        help="for checkpoints and history.csv (default: where the notebooks look for those of the profile)",
    )  # fmt: skip
    command.add_argument(
        "--ckpt", type=Path, metavar="FILE", help=".safetensors to start from (default: the profile's)"
    )
    command.add_argument(
        "--teacher", type=Path, metavar="FILE",
        help=".safetensors of the model that teaches, for runs that have one (default: the profile's)",
    )  # fmt: skip
    command.add_argument("--epochs", type=int, metavar="N", help="passes over the images (default: the profile's)")
    command.add_argument("--batch-size", type=int, metavar="N", help="images in a step (default: the profile's)")
    command.add_argument("--lr", type=float, metavar="X", help="peak learning rate (default: the profile's)")

    description = "accuracy, F1, depth and GFLOPs of a checkpoint on the test images"
    command = add("test", test, [device, folder, trained], description)
    command.add_argument(
        "--batch-size", type=int, default=250, metavar="N", help="images at once (default: %(default)s)"
    )

    command = add("visualize", visualize, [device, folder, trained], "draw where an A-ViT stopped looking")
    command.add_argument(
        "--images", nargs="+", default=["22", "29", "40", "43", "76", "109"], metavar="I",
        help="numbers of test images, or paths of image files (default: 22 29 40 43 76 109)",
    )  # fmt: skip
    command.add_argument("--output", type=Path, default="halting.png", metavar="FILE", help="(default: %(default)s)")

    command = add(
        "benchmark", benchmark, [device], "time DeiT, masked and packed A-ViT side by side on synthetic halting"
    )
    command.add_argument(
        "--model", default="avit_tiny_patch16_224", metavar="NAME", help="a timm name avit_* (default: %(default)s)"
    )
    command.add_argument("--depth", type=float, default=7.0, metavar="X", help="mean depth in layers (default: 7)")
    command.add_argument(
        "--batch", type=int, nargs="+", default=[1, 8, 64, 256], metavar="N", help="images (default: 1 8 64 256)"
    )
    command.add_argument("--task", nargs="+", choices=TASKS, default=TASKS, help="(default: both)")
    command.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="(default: both)")
    command.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds of each timing (default: 7)")
    command.add_argument(
        "--limit", type=float, default=40.0, metavar="S",
        help="seconds of a timing after which, from the third round on, no more begins (default: 40)",
    )  # fmt: skip

    add("data", data, [], "find, read and describe the data of a profile; compare their split with the one on record")
    add("search", search, [device], "train the profile's candidates, compare them on the validation images")
    add("sweep", sweep, [device], "train and test the profile's best runs from several seeds: mean and deviation")
    return parser
