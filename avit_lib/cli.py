"""The command line, ``python -m avit_lib``: what each command takes, read off by cyclopts.

Arguments are looked at here; what a command does stands in ``commands``, which imports torch, and
is imported only when they are right.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter, Token, validators
from cyclopts.types import ExistingDirectory, ExistingFile

from avit_lib.errors import UserError
from avit_lib.study.reading import check_run, read_profile

app = App(
    "python -m avit_lib",
    help="Train, test and look into A-ViT.",
    default_parameter=Parameter(negative=()),
    version_flags=[],
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)


def read_whole(kind: type, tokens: Sequence[Token]) -> int:
    """A whole number as it was typed; cyclopts would round others without a word."""
    if not tokens[0].value.removeprefix("-").isdecimal():
        raise ValueError(f"{tokens[0].value!r} is no whole number")
    return int(tokens[0].value)


Whole = Annotated[int, Parameter(converter=read_whole)]
Seed = Annotated[Whole, Parameter(validator=validators.Number(gte=0, lt=2**32))]
Count = Annotated[Whole, Parameter(validator=validators.Number(gte=1, lt=2**31))]
Weights = Annotated[Path, Parameter(validator=validators.Path(ext="safetensors"))]
Picture = Annotated[
    Path, Parameter(validator=validators.Path(ext=("png", "jpg", "jpeg", "webp", "pdf", "svg")))
]


@Parameter(name="*")
@dataclass
class Common:
    """What every command takes.

    Args:
        profile: The study: caltech24, caltech101, ... or a TOML file of your own.
        seed: Of everything random.
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
class Chosen(Computing):
    """What every command takes that works on a run of a profile.

    Args:
        model: deit, avit or another run of the profile. Default: the profile's focus.
        ckpt: A .safetensors that fit wrote, its .json beside it. Default: the profile's.
        data_dir: A folder of your own with train/, test/ and perhaps val/, in each one folder of
            images a class. Default: the profile's data.
    """

    model: str | None = None
    ckpt: ExistingFile | None = None
    data_dir: ExistingDirectory | None = None

    def check(self) -> None:
        """Raise UserError for a profile or a model that is not there."""
        path, tables = read_profile(self.profile)
        if self.model:
            self.model = self.model.lower()
            check_run(path.stem, tables["runs"], self.model)


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit status.

    0: done; 2: a fault that the user can mend, told in one line; 130: Ctrl-C.
    """
    try:
        app(arguments, print_error=False, exit_on_error=False)
        print(end="", flush=True)  # what is printed may fail here, and not when Python ends
        return 0
    except BrokenPipeError:
        raise
    except (UserError, CycloptsError, OSError) as error:
        speaker = f"process {os.environ['RANK']}: " if "RANK" in os.environ else ""
        words = f"{error}{'; allow that, or name another' if isinstance(error, OSError) else ''}"
        print(f"{speaker}error: {' '.join(words.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to resume", file=sys.stderr)
        return 130


@contextmanager
def working() -> Iterator[ModuleType]:
    """``commands``, imported only now, in the processes of this launch."""
    from avit_lib import commands
    from avit_lib.training import processes

    with processes.join_others():
        yield commands


@app.command
def fit(
    *,
    common: Chosen = Chosen(),
    output: Path | None = None,
    teacher: ExistingFile | None = None,
    epochs: Whole | None = None,
    batch_size: Whole | None = None,
    lr: float | None = None,
) -> None:
    """Train a model; the same command resumes where it stopped.

    Args:
        output: Folder for checkpoints and history.csv. Default: where the notebooks look for those
            of the profile; the runs that this one starts or learns from are then trained first.
        teacher: The .safetensors of the model that teaches, for runs that have one. Default: the
            profile's.
        epochs: Passes over the images. Default: the profile's.
        batch_size: Images in a step. Default: the profile's.
        lr: Peak learning rate. Default: the profile's.
    """
    common.check()
    given = {"epochs": epochs, "batch_size": batch_size, "learning_rate": lr}
    changes = {name: value for name, value in given.items() if value is not None}
    if output is None and (common.data_dir or common.ckpt or teacher or changes):
        raise UserError(
            "data, weights or settings of your own need a folder of their own: add --output DIR"
        )
    with working() as commands:
        commands.fit(common, output, teacher, changes)


@app.command
def test(
    *,
    common: Chosen = Chosen(),
    batch_size: Count = 250,
    data: Literal["imagenet"] | None = None,
    images: ExistingDirectory | None = None,
) -> None:
    """Accuracy, F1, depth and GFLOPs of a checkpoint on the test images, also as JSON beside it.

    With --data imagenet: DeiT-T with its ImageNet weights (or --model, a timm name, or --ckpt),
    plain, with ToMe, and adapted to as many FLOPs, on ImageNet's validation images.

    Args:
        batch_size: Images at once.
        data: imagenet, to be tested there and not on the images of the profile.
        images: The folder with ImageNet's validation images, one folder a class; or with those in
            val/, and train/.
    """
    if bool(data) != bool(images):
        raise UserError("--data imagenet and --images DIR go together: name both, or neither")
    if not data:
        common.check()
    with working() as commands:
        if data:
            commands.test_on_imagenet(common, images, batch_size)
        else:
            commands.test(common, batch_size)


@app.command
def visualize(
    *,
    common: Chosen = Chosen(),
    output: Picture = Path("halting.png"),
    images: Annotated[list[str], Parameter(consume_multiple=1)] = [],
) -> None:
    """Draw where a model stopped looking, and what it still saw, into one picture.

    Args:
        output: The .png, .jpg, .webp, .pdf or .svg to write.
        images: Numbers of test images, or paths of image files. Default: six test images, evenly
            spread.
    """
    common.check()
    with working() as commands:
        commands.visualize(common, output, images)


@app.command
def adapt(
    *,
    common: Computing = Computing(),
    images: ExistingDirectory,
    output: Weights,
    model: str = "deit_tiny_patch16_224",
    weights: ExistingFile | None = None,
    saved: float = 0.4,
) -> None:
    """Let any VisionTransformer of timm's save FLOPs without training: its tokens merge.

    Args:
        images: A folder with some hundred images, in it or below, on which thresholds are set; no
            labels.
        output: The .safetensors to write, which test and visualize take as --ckpt.
        model: Its timm name.
        weights: Its .safetensors or .pth, or what fit wrote, with its .json. Default: timm's
            pretrained ones.
        saved: The share of FLOPs to save, 0 to 0.8.
    """
    with working() as commands:
        commands.adapt(common, images, output, model, weights, saved)


@app.command
def benchmark(
    *,
    common: Computing = Computing(),
    model: str = "deit_tiny_patch16_224",
    ckpt: ExistingFile | None = None,
    saved: float = 0.4,
    images: ExistingDirectory | None = None,
) -> None:
    """Measure what a model gains on this machine when tokens leave: images/s with and without.

    Args:
        model: Its timm name; it is adapted, like adapt does, and not trained.
        ckpt: A .safetensors that fit or adapt wrote, its .json beside it, in place of a name.
        saved: The share of FLOPs to save, 0 to 0.8; of a model that is not adaptive yet.
        images: A folder with a hundred images or more, in it or below. Default: those in data/.
    """
    with working() as commands:
        commands.benchmark(common, model, ckpt, saved, images)


@app.command
def data(*, common: Common = Common()) -> None:
    """Find, read and describe the data of a profile; compare their split with the one on record."""
    read_profile(common.profile)
    with working() as commands:
        commands.describe_data(common)
