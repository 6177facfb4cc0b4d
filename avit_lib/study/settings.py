"""Profiles: the settings of a study, each key with its meaning, default and range.

A profile that ``extends`` another one, by name or path, has its settings but for its own; so has a
run that ``extends`` another run. ``purpose``, ``notes`` and ``licence`` are of one profile alone;
its ``peers``, ``sweep_peers``, ``recalibrated`` and ``budgets`` replace those of the other one. The
section ``training`` of a file is for all of its runs, whose own come first.
"""

import re
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from avit_lib.adaptive import MOST
from avit_lib.data import Data
from avit_lib.errors import UserError
from avit_lib.peers import PEERS
from avit_lib.profiles import check, read_profile
from avit_lib.training import Training
from avit_lib.training.loop import NotNegative, Positive

Number = Annotated[float, Meta(ge=-1e6, le=1e6)]
Seed = Annotated[int, Meta(ge=0, lt=2**32)]
Layers = Annotated[float, Meta(ge=1)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Saved = Annotated[float, Meta(ge=0, le=MOST)]  # share of the FLOPs
Name = Annotated[str, Meta(pattern="^[a-z0-9_]+$")]


class Halting(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens halt and what the halting is trained for (defaults: the paper's)."""

    gamma: Number = 5.0
    beta: Number = -10.0
    eps: Annotated[float, Meta(gt=0, lt=1)] = 0.01
    alpha_ponder: NotNegative = 5e-4  # alpha_p
    ponder_ramp: Fraction = 0.0  # part of training in which alpha_p grows from 0; 0: always full
    alpha_distr: NotNegative = 0.1  # alpha_d
    target_depth: Layers = 8.0  # mu, in layers from 1; the published code counts from 0
    target_std: Positive = 1.0
    kl_direction: Literal["paper", "code"] = "paper"  # KL(H || target); "code": KL(target || H)
    # "beta": channel 0 as the backbone has it; "class_attention" (not in the paper): fitted to
    # that, see ``starts.py``.
    start: Literal["beta", "class_attention"] = "beta"
    channel_rate: Fraction = 1.0  # of a fitted channel 0: its learning rate, of that of all else
    task_gradient: NotNegative = 0.0  # with which the task trains scores (``halting.fade``); 0: not

    def __post_init__(self):
        if self.channel_rate != 1 and not self.fitted:
            raise ValueError(
                'channel_rate is of a channel 0 that is fitted: with start = "beta" it must be 1'
            )

    @property
    def fitted(self) -> bool:
        """Whether channel 0 is fitted before training."""
        return self.start != "beta"

    @property
    def model_arguments(self) -> dict[str, Any]:
        """What the model itself needs, as arguments of ``timm.create_model``."""
        return {"gamma": self.gamma, "beta": self.beta, "eps": self.eps}

    @property
    def objective(self) -> dict[str, Any]:
        """What ``losses.AdaptiveLoss`` needs."""
        own = {"start", "channel_rate", "task_gradient", *self.model_arguments}
        return {name: getattr(self, name) for name in self.__struct_fields__ if name not in own}


class Run(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One trained model: what it is, where it starts, how it is trained."""

    name: Name  # folder of its checkpoints
    label: str  # what tables and figures call it
    model: str  # timm name
    init: str  # "pretrained", or the name of the run whose weights it starts from
    training: Training
    halting: Halting | None = None  # None: a plain transformer
    saved: Saved = 0.0  # share of FLOPs that a plain one saves by ``adaptive.adapt``
    pretrained: str = ""  # timm name of the weights that init "pretrained" means
    teacher: str = ""  # name of the run whose trained model teaches this one; "": nobody
    distillation: Positive = 1.0  # weight of the teacher, beside the cross-entropy's 1

    def __post_init__(self):
        training = self.training
        if bool(self.halting) != self.model.startswith("avit_"):
            raise ValueError(
                f"model {self.model!r}: models avit_* have a section halting, and no others have"
            )
        if self.init == "pretrained" and not self.pretrained:
            raise ValueError("init is pretrained; name the weights of timm's, as pretrained")
        if self.pretrained and self.start:
            raise ValueError(
                f"pretrained is for init = 'pretrained'; init is {self.init!r}, so take it out, or "
                f"set it to ''"
            )
        if training.warmup_epochs >= training.epochs:
            raise ValueError(
                f"warmup_epochs must be fewer than epochs, not {training.warmup_epochs:g} of "
                f"{training.epochs}"
            )

    @property
    def method(self) -> str:
        """Whose it is: "plain", "paper" (the published rule) or "ours"."""
        if self.halting:
            return "paper"
        return "ours" if self.saved else "plain"

    @property
    def start(self) -> str:
        """The name of the run whose weights it starts from; empty if it starts from none."""
        return "" if self.init == "pretrained" else self.init


class Profile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One study from data to results; its results lie in results/<name>."""

    name: Name
    purpose: str
    data: Data
    runs: tuple[Run, ...]
    focus: str = "avit_finetuned"  # the run that notebooks look into, and ``fit`` trains
    smoke: bool = False  # only a check that everything runs
    # Mean depths to which beta of a run is set after training.
    recalibrated: dict[Name, tuple[Layers, ...]] = {}
    # Shares of FLOPs to which a run that merges is set after training.
    budgets: dict[Name, tuple[Saved, ...]] = {}
    # Other methods, each with its number at several budgets (``peers``).
    peers: dict[str, tuple[int | float, ...]] = {}
    adapted: tuple[Saved, ...] = ()  # such budgets of ``adaptive.adapt``, as shares of FLOPs saved
    sweep: tuple[str, ...] = ()  # runs that notebook 08 trains from each of these seeds
    sweep_seeds: tuple[Seed, ...] = (0, 1, 2)
    # Peers of notebook 08, the mildest number first; it trains each with the last but one.
    sweep_peers: dict[str, tuple[int | float, ...]] = {}
    licence: str = ""  # of the weights that ``scripts/release.py`` writes
    notes: tuple[str, ...] = ()  # where the numbers come from, for the page of results

    def __post_init__(self):
        labels, before = [run.label for run in self.runs], {""}
        for run in self.runs:
            unfit = not run.label.strip() or re.search(r", |[|\n]", run.label)
            if run.label in {*PEERS, "Adaptive merging"}:
                raise ValueError(f"label {run.label!r} is that of another method")
            if unfit or labels.count(run.label) > 1:
                raise ValueError(
                    f"label {run.label!r}: tables need one that no other run has, without comma, "
                    f"bar or line break"
                )
            if not before >= {run.start, run.teacher}:
                raise ValueError(
                    f"run {run.name}: init and teacher name runs above it, or init is pretrained"
                )
            before.add(run.name)
            patch = re.search(r"_patch(\d+)", run.model)
            if patch and self.data.image_size % int(patch[1]):
                raise ValueError(
                    f"image_size {self.data.image_size} is no multiple of the patch of {run.model}"
                )
            unset = not run.halting and run.name in self.recalibrated
            if unset or (not run.saved and run.name in self.budgets):
                raise ValueError(
                    f"run {run.name}: recalibrated is of runs that halt, budgets of runs that merge"
                )
        for name in {self.focus, *self.sweep} - before:
            raise ValueError(f"focus and sweep name runs; there is no run {name!r}")
        for name in {*self.peers, *self.sweep_peers} - {*PEERS}:
            raise ValueError(f"there is no peer {name!r}; choose from {', '.join(PEERS)}")
        if any(len(numbers) != len(self.adapted) for numbers in self.peers.values()):
            raise ValueError("peers need as many numbers each as adapted: 07 pairs them")
        if not self.sweep_seeds or len(set(self.sweep_seeds)) < len(self.sweep_seeds):
            raise ValueError("sweep_seeds names no seed, or one twice")

    def run(self, name: str) -> Run:
        """The run called ``name``; raises UserError when there is none."""
        known = {run.name: run for run in self.runs}
        if name not in known:
            raise UserError(
                f"profile {self.name!r} has no run {name!r}; choose from {', '.join(known)}"
            )
        return known[name]

    @property
    def plain(self) -> Run:
        """The run, neither halting nor merging, that the others are compared with."""
        return next(run for run in self.runs if run.method == "plain")


def get_profile(name: str) -> Profile:
    """The profile called ``name``, or in the file ``name`` that ends in .toml.

    A profile is called like its file. Raises UserError, one line that names file and key, when it
    is missing or something in it is wrong.
    """
    path, tables = read_profile(name)
    # what every run says anew is checked, too
    shared = {"epochs": 1, "learning_rate": 1.0} | tables.pop("training", {})
    check(path, "training", shared, Training)
    tables["runs"] = [check(path, f"runs.{run['name']}", run, Run) for run in tables["runs"]]
    return check(path, "", tables, Profile)
