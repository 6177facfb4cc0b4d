"""The command line, ``python -m avit_lib``: a function a command, whose options are read off it by
cyclopts.

What takes long to import, as torch does, is imported where it is used: ``--help`` needs none of it.
"""

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from cyclopts import App, CycloptsError, Parameter, Token
from cyclopts.validators import Number

from avit_lib.errors import UserError

app = App(
    "python -m avit_lib",
    help="Train, test and look into A-ViT.",
    default_parameter=Parameter(negative=()),
    version_flags=[],
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
Several = Parameter(consume_multiple=1)


def read_whole(kind: type, tokens: Sequence[Token]) -> int:
    """A whole number as it was typed; cyclopts would round others without a word."""
    if not tokens[0].value.removeprefix("-").isdecimal():
        raise ValueError(f"{tokens[0].value!r} is no whole number")
    return int(tokens[0].value)


Whole = Annotated[int, Parameter(converter=read_whole)]
Seed = Annotated[Whole, Parameter(validator=Number(gte=0, lt=2**32))]
Count = Annotated[Whole, Parameter(validator=Number(gte=1, lt=2**31))]
Task, Precision = Literal["inference", "training"], Literal["float32", "bfloat16"]


@Parameter(name="*")
@dataclass
class Common:
    """What every command takes.

    Args:
        profile: The study: caltech24, caltech101, ... (avit_lib/study/profiles), or a TOML file of
        your own. seed: Of everything random.
    """

    profile: str = "caltech24"
    seed: Seed = 0


@Parameter(name="*")
@dataclass
class Computing(Common):
    """What every command takes that runs a model.

    Args:
        device: Where to compute; auto: on a GPU if there is one.
    """

    device: Literal["auto", "cpu", "gpu"] = "auto"


@Parameter(name="*")
@dataclass
class Trained(Computing):
    """What every command takes that looks at a trained model.

    Args:
        model: DeiT, AViT or another run of the profile. Default: the one the notebooks look into.
        ckpt: A .safetensors that fit wrote, its .json beside it. Default: the profile's, of
        --model. data_dir: A folder of your own with test/, in it one folder of images a class.
        Default: the profile's data.
    """

    model: str | None = None
    ckpt: Path | None = None
    data_dir: Path | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 after a fault that the user can mend, 130 after
    Ctrl-C.
    """
    speaker = ""
    try:
        command, given, _ = app.parse_args(arguments, print_error=False, exit_on_error=False)
        if command.__module__ != __name__:  # cyclopts' own: --help
            return command(*given.args, **given.kwargs) or 0
        from avit_lib.training import processes

        with processes.processes():
            speaker = f"process {processes.rank()}: " if processes.count() > 1 else ""
            status = command(*given.args, **given.kwargs) or 0
            print(end="", flush=True)  # what is printed may fail here, and not when Python ends
            return status
    except BrokenPipeError:
        raise
    except (UserError, CycloptsError, OSError) as error:
        words = f"{error}{'; allow that, or name another' if isinstance(error, OSError) else ''}"
        print(f"{speaker}error: {' '.join(words.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to resume", file=sys.stderr)
        return 130


@app.command
def fit(
    *,
    common: Computing = Computing(),
    model: str = "AViT",
    output: Path | None = None,
    data_dir: Path | None = None,
    ckpt: Path | None = None,
    teacher: Path | None = None,
    epochs: Whole | None = None,
    batch_size: Whole | None = None,
    lr: float | None = None,
) -> None:
    """Train a model; the same command resumes where it stopped.

    Args:
        model: DeiT, AViT or another run of the profile. output: Folder for checkpoints and
        history.csv. Default: where the notebooks look for those of the profile;
            the runs that this one starts or learns from are then trained first.
        data_dir: A folder of your own with train/ and perhaps val/, in each one folder of images a
        class.
            Default: the data of the profile.
        ckpt: The .safetensors to start from. Default: the profile's. teacher: The .safetensors of
        the model that teaches, for runs that have one. Default: the profile's. epochs: Passes over
        the images. Default: the profile's. batch_size: Images in a step. Default: the profile's.
        lr: Peak learning rate. Default: the profile's.
    """
    from avit_lib.data import folder_training_data
    from avit_lib.study import Study
    from avit_lib.study.results import to_markdown
    from avit_lib.study.settings import changed
    from avit_lib.study.study import train_run

    study = Study(common.profile, common.seed, device=common.device)
    declared = study.profile.run(model.lower())
    wanted = {"epochs": epochs, "batch_size": batch_size, "learning_rate": lr}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if output is None:
        if data_dir or ckpt or teacher or wanted:
            raise UserError(
                "data, weights or settings of your own need a folder of their own: add --output DIR"
            )
        output, history = study.folder(declared.name), study.train_chain(declared.name)
    else:
        run = changed(
            declared, declared.name, training=msgspec.to_builtins(declared.training) | wanted
        )
        found = (
            folder_training_data(data_dir, study.profile.data, common.seed)
            if data_dir
            else study.data
        )
        history = train_run(run, found, output, ckpt, teacher, common.seed, study.device)
    print(to_markdown(history.tail(1)))
    print(f"checkpoints and history: {output}")


@app.command
def adapt(
    *,
    common: Computing = Computing(),
    images: Path,
    output: Path,
    model: str = "deit_tiny_patch16_224",
    weights: Path | None = None,
    saved: float = 0.4,
) -> None:
    """Let any VisionTransformer of timm's save FLOPs without training: its tokens merge by
    thresholds set on images.

    Args:
        images: A folder with some hundred images, in it or below; no labels. output: The
        .safetensors to write, which test and visualize take as --ckpt. model: Its timm name.
        weights: Its .safetensors or .pth, or what fit wrote, with its .json. Default: timm's
        pretrained ones. saved: The share of FLOPs to save, 0 to 0.8.
    """
    from avit_lib.study import adapting
    from avit_lib.training import pick_device

    found, described = adapting.trained_model(model, weights)
    adapting.adapt_files(
        found, described, images, saved, output, common.seed, pick_device(common.device)
    )
    print(f"written to {output}")


@app.command
def test(
    *,
    common: Trained = Trained(),
    batch_size: Count = 250,
    data: Literal["imagenet"] | None = None,
    images: Path | None = None,
) -> None:
    """Accuracy, F1, depth and GFLOPs of a checkpoint on the test images; the same as JSON beside
    the checkpoint.

    With --data imagenet: DeiT-T with its ImageNet weights (or --model, a timm name, or --ckpt),
    plain, with ToMe, and adapted to as many FLOPs, on ImageNet's validation images.

    Args:
        batch_size: Images at once. data: imagenet, to be tested there and not on the images of the
        profile. images: The folder with ImageNet's validation images, one folder a class; or with
        those in val/, and train/.
    """
    import pandas as pd

    from avit_lib.study import adapting, inspecting
    from avit_lib.study.results import provenance, to_markdown
    from avit_lib.training import pick_device, processes, write_json

    if bool(data) != bool(images):
        raise UserError("--data imagenet and --images DIR go together: name both, or neither")
    device = pick_device(common.device)
    if data:
        found, _ = adapting.trained_model(common.model or "deit_tiny_patch16_224", common.ckpt)
        return print(
            to_markdown(adapting.imagenet_table(found, images, common.seed, device, batch_size))
        )
    model, run, path = inspecting.load(
        common.profile, common.seed, common.device, common.model, common.ckpt
    )
    if not run["classes"]:
        raise UserError(f"{path} has ImageNet's classes; test it by --data imagenet --images DIR")
    target = inspecting.record_beside(path)
    found = inspecting.test_images(common.profile, common.data_dir, model, run)
    facts = inspecting.figures_of(model, found, common.seed, device, batch_size)
    print(json.dumps(facts, indent=1))
    if processes.rank() == 0:
        print(to_markdown(pd.DataFrame([facts]).drop(columns="intervals")), file=sys.stderr)
        write_json(target, facts | {"provenance": provenance(run.get("profile", ""), run["seed"])})
    print(f"written to {target}", file=sys.stderr)


@app.command
def visualize(
    *,
    common: Trained = Trained(),
    output: Path = Path("halting.png"),
    images: Annotated[list[str], Several] = [],
) -> None:
    """Draw where an A-ViT stopped looking, and what it still saw, into one picture.

    Args:
        output: The .png, .jpg, .webp, .pdf or .svg to write; without a suffix, a PNG. images:
        Numbers of test images, or paths of image files. Default: a test image of each of six
        classes.
    """
    from avit_lib.study import inspecting
    from avit_lib.training import pick_device

    model, run, _ = inspecting.load(
        common.profile, common.seed, common.device, common.model, common.ckpt
    )
    test_images = partial(
        inspecting.test_images, common.profile, common.data_dir, model, run, decode=False
    )
    figure = inspecting.picture(model, run, images, test_images, pick_device(common.device))
    inspecting.write_picture(figure, output)
    print(f"written to {output}")


@app.command
def data(*, common: Common = Common()) -> None:
    """Find, read and describe the data of a profile; compare their split with the one on record."""
    from avit_lib import data as datasets
    from avit_lib.study import get_profile
    from avit_lib.study.results import results_dir
    from avit_lib.training import read_json

    profile = get_profile(common.profile)
    if files := datasets.check_embedded(datasets.data_dir()):
        print(f"{files} embedded files are as published (SHA256SUMS)")
    found, tested = (
        datasets.training_data(profile.data, common.seed),
        datasets.test_data(profile.data, common.seed),
    )
    split, classes = found.split, len(found.train.classes)
    sizes = f"{split['train_images']} training, {split['validation_images']} validation, {len(tested)} test"
    print(f"{profile.data.dataset} under {datasets.data_dir()}: {sizes} images, {classes} classes")
    for role, part in (
        ("training", found.train),
        ("validation", found.validation),
        ("test", tested),
    ):
        counts = part.labels.bincount(minlength=classes)
        print(f"  {role}: {counts.min()} to {counts.max()} images a class")
    print(f"split by seed {common.seed}, sha256 {split['sha256']}")
    path = results_dir(profile.name) / "metrics" / "split.json"
    recorded = read_json(path) if path.is_file() else {}
    if recorded.get("seed") == common.seed and "sha256" in recorded:
        compared = datasets.check_split(recorded, split)
        print(f"the same as in {path}, compared by {compared}")


@app.command
def benchmark(
    *,
    common: Computing = Computing(),
    model: str = "avit_tiny_patch16_224",
    depth: float = 7.0,
    batch: Annotated[list[int], Several] = [1, 8, 64, 256],
    task: Annotated[list[Task], Several] = ["inference", "training"],
    precision: Annotated[list[Precision], Several] = ["float32", "bfloat16"],
    repeats: Whole = 7,
    limit: float = 40.0,
) -> None:
    """Time DeiT, masked and packed A-ViT side by side on synthetic halting; tables and figures in
    results/benchmark.

    Args:
        model: A timm name avit_*.
        depth: Mean depth in layers.
        batch: Batch sizes in images.
        task: What to time.
        precision: In which precision.
        repeats: Rounds of each timing.
        limit: Seconds of a timing after which, from the third round on, no more begins.
    """
    from avit_lib.study.benchmark import run_benchmark
    from avit_lib.study.results import to_markdown
    from avit_lib.training import pick_device

    device = pick_device(common.device)
    speed, page = run_benchmark(
        model, depth, batch, task, precision, repeats, limit, common.seed, device
    )
    print(to_markdown(speed))
    print(f"tables and figures: {page}")


@app.command
def sweep(*, common: Computing = Computing()) -> None:
    """Train and test the best runs of a profile from several seeds: mean and standard deviation."""
    from avit_lib.study import get_profile
    from avit_lib.study.results import results_dir, to_markdown
    from avit_lib.study.sweep import run_sweep

    print(to_markdown(run_sweep(common.profile, common.seed, common.device)))
    print(
        f"written to {results_dir(get_profile(common.profile).name) / 'tables' / 'sweep.csv'}",
        file=sys.stderr,
    )


@app.command
def release(*, common: Computing = Computing()) -> None:
    """Write the headline models of a profile in half precision, to be committed, and what that
    costs them.
    """
    from avit_lib.study import Study, releasing
    from avit_lib.study.results import to_markdown

    print(
        to_markdown(releasing.release(Study(common.profile, common.seed, "release", common.device)))
    )


@app.command
def notebooks(*, common: Common = Common(), fresh: bool = False) -> int | None:
    """Run those notebooks of a profile whose results are out of date, by papermill, then write the
    pages of results.

    Args:
        fresh: Run all of them, and train again; resumes after an interruption.
    """
    from avit_lib.data import project_root
    from avit_lib.study.notebooks import NotebookFailed, Runner

    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # to be terminated is to be interrupted
    runner = Runner(common.profile, common.seed, project_root() / "notebooks")
    try:
        runner.run_fresh() if fresh else runner.run_stale()
    except NotebookFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return readme(common=common)


@app.command
def readme(*, common: Common = Common()) -> None:
    """Write the page of a profile's results and the tables in README.md again."""
    from avit_lib.study import get_profile
    from avit_lib.study.results import stamp_pages, write_page

    print(f"results: {write_page(get_profile(common.profile))}")
    stamp_pages()


@app.command
def badges(*, check: bool = False) -> int:
    """Stamp the repository's address, from pyproject.toml, into the notebooks.

    Args:
        check: Change nothing; exit 1 if a notebook is not up to date.
    """
    from avit_lib.data import project_root
    from avit_lib.study.notebooks import repository_address, stamp

    root = project_root()
    outdated = stamp(root / "notebooks", repository_address(root), check)
    print(f"{'out of date' if check else 'stamped'}: {', '.join(outdated) or 'none'}")
    return int(check and bool(outdated))
