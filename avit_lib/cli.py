"""The command line, ``python -m avit_lib``: what each command takes, read off by cyclopts.

Arguments are read here; what a command does stands in ``commands``, which imports torch, and is
imported only when they are right. A command returns its name there, and its arguments.
"""

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter, Token, validators
from cyclopts.types import ExistingDirectory, ExistingFile

from avit_lib.errors import UserError

app = App(
    "python -m avit_lib",
    help="Train, test and look into A-ViT.",
    default_parameter=Parameter(negative=()),
    version_flags=[],
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)


def read_number(kind: type, tokens: Sequence[Token]) -> float:
    """A number as others write it; Python's own 1_0 is no 10, and cyclopts would round 1.5."""
    word = tokens[0].value
    try:
        return kind("" if "_" in word else word)
    except ValueError:
        raise ValueError(f"{word!r} is no {'whole ' * (kind is int)}number") from None


def read_path(_: type, tokens: Sequence[Token]) -> Path:
    """A path to write, its home folder in place of ~, which shells leave after ``=``."""
    return Path(os.path.expanduser(tokens[0].value))


Real = Annotated[float, Parameter(converter=read_number)]
Whole = Annotated[int, Parameter(converter=read_number)]
Seed = Annotated[Whole, Parameter(validator=validators.Number(gte=0, lt=2**32))]
Count = Annotated[Whole, Parameter(validator=validators.Number(gte=1, lt=2**31))]
Written = Annotated[Path, Parameter(converter=read_path)]
Weights = Annotated[Written, Parameter(validator=validators.Path(ext="safetensors"))]
Picture = Annotated[
    Written, Parameter(validator=validators.Path(ext=("png", "jpg", "jpeg", "webp", "pdf", "svg")))
]


@Parameter(name="*")
@dataclass
class Common:
    """What every command takes.

    Args:
        seed: Of everything random; a model that is trained keeps its own.
    """

    seed: Seed = 0


@Parameter(name="*")
@dataclass
class Studied(Common):
    """What every command takes that works on a study.

    Args:
        profile: The study: caltech24, caltech101, ... or a TOML file of your own.
    """

    profile: str = "caltech24"


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
class Chosen(Computing, Studied):
    """What every command takes that works on a run of a profile.

    Args:
        model: deit, avit or another run of the profile. Default: the profile's focus.
        ckpt: A .safetensors that fit wrote, its .json beside it. Default: the profile's.
    """

    model: str | None = None
    ckpt: ExistingFile | None = None

    def __post_init__(self):
        self.model = self.model and self.model.lower()


@Parameter(name="*")
@dataclass
class Fed(Chosen):
    """What every command takes that needs images with labels.

    Args:
        data_dir: A folder of your own with train/, test/ and perhaps val/, in each one folder of
            images a class. Default: the profile's data.
    """

    data_dir: ExistingDirectory | None = None


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit status.

    0: done; 2: a fault that the user can mend, told in one line; 130: Ctrl-C; 141: nobody reads
    the output to its end.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if "" in arguments:  # a path of no letters would be the current folder
            raise UserError("an argument is empty; is a variable of your shell not set?")
        chosen = app(arguments, print_error=False, exit_on_error=False)
        if chosen:  # not --help
            from avit_lib import commands
            from avit_lib.training import processes

            with processes.join_others():
                getattr(commands, chosen[0])(*chosen[1:])
        print(end="", flush=True)  # what is printed may fail here, and not when Python ends
        return 0
    except BrokenPipeError:
        # Or Python would complain when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, CycloptsError, OSError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to resume", file=sys.stderr)
        return 130


@app.command
def fit(
    *,
    common: Fed = Fed(),
    output: Written | None = None,
    teacher: ExistingFile | None = None,
    epochs: Whole | None = None,
    batch_size: Whole | None = None,
    lr: Real | None = None,
) -> tuple:
    """Train a model; the same command resumes where it stopped.

    Args:
        output: Folder for checkpoints and history.csv. Default: where the notebooks look for those
            of the profile; the runs that this one starts or learns from are then trained first.
        teacher: The .safetensors of a model that teaches this one. Default: the profile's, for runs
            that have one.
        epochs: Passes over the images. Default: the profile's.
        batch_size: Images in a step. Default: the profile's.
        lr: Peak learning rate. Default: the profile's.
    """
    given = {"epochs": epochs, "batch_size": batch_size, "learning_rate": lr}
    changes = {name: value for name, value in given.items() if value is not None}
    return "fit", common, output, teacher, changes


@app.command
def test(*, common: Fed = Fed(), batch_size: Count = 100) -> tuple:
    """Print accuracy, F1, depth and GFLOPs of a checkpoint on the test images, as JSON.

    Args:
        batch_size: Images at once.
    """
    return "test", common, batch_size


@app.command
def visualize(
    *,
    common: Chosen = Chosen(),
    images: Annotated[list[ExistingFile], Parameter(consume_multiple=1)],
    output: Picture = Path("halting.png"),
) -> tuple:
    """Draw where a model stopped looking, and what it still saw, into one picture.

    Args:
        images: Image files.
        output: The .png, .jpg, .webp, .pdf or .svg to write.
    """
    return "visualize", common, images, output


@app.command
def adapt(
    *,
    common: Computing = Computing(),
    images: ExistingDirectory,
    output: Weights,
    model: str | None = None,
    weights: ExistingFile | None = None,
    saved: Real = 0.4,
) -> tuple:
    """Let any VisionTransformer of timm's save FLOPs without training: its tokens merge.

    Args:
        images: A folder with some hundred images, in it or below, on which thresholds are set; no
            labels. Not the test images: what a test said of these would be optimistic.
        output: The .safetensors to write, which visualize takes as --ckpt, and test, if fit has
            trained the model.
        model: Its timm name. Default: what fit or adapt wrote with the weights, else
            deit_tiny_patch16_224.
        weights: Its .safetensors or .pth, or what fit wrote, with its .json. Of a .pth that holds
            averaged weights, too, as timm writes them (model_ema or state_dict_ema), those.
            Default: timm's pretrained ones.
        saved: The share of FLOPs to save, 0 to 0.8.
    """
    return "adapt", common, images, output, model, weights, saved


@app.command
def benchmark(
    *,
    common: Computing = Computing(),
    model: str | None = None,
    ckpt: ExistingFile | None = None,
    saved: Real = 0.4,
    images: ExistingDirectory | None = None,
) -> tuple:
    """Measure what a model gains on this machine when tokens leave: images/s with and without.

    Args:
        model: Its timm name; it is adapted, like adapt does, and not trained. Default: that of the
            checkpoint, else deit_tiny_patch16_224.
        ckpt: A .safetensors that fit or adapt wrote, its .json beside it, in place of a name.
        saved: The share of FLOPs to save, 0 to 0.8; of a model that is not adaptive yet.
        images: A folder with a hundred images or more, in it or below; batches of 8 and 64 are
            left out where it has fewer. Default: those in data/.
    """
    return "benchmark", common, model, ckpt, saved, images


@app.command
def data(*, common: Studied = Studied()) -> tuple:
    """Find, read and describe the data of a profile; compare their split with the one on record."""
    return "describe_data", common
