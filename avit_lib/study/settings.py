"""Profiles: the settings of a study, read from one TOML file each (``profiles/``, or a file of
one's own) and checked.

A profile that ``extends`` another one, by name or path, has its settings but for its own; so has a
run that ``extends`` another run. The sections ``training`` and ``halting`` of a file are for all of
its runs, whose own come first.
"""

from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from avit_lib.adaptive import MOST
from avit_lib.data import Data
from avit_lib.errors import UserError
from avit_lib.losses import TaskLoss, Teacher
from avit_lib.training import Training
from avit_lib.training.loop import NotNegative, Positive

PROFILES = Path(__file__).resolve().with_name("profiles")
Layers, Fraction = Annotated[float, Meta(ge=1)], Annotated[float, Meta(ge=0, le=1)]
Saved = Annotated[float, Meta(ge=0, le=MOST)]  # share of the FLOPs
Name = Annotated[str, Meta(pattern="^[a-z0-9_]+$")]


class Halting(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens halt and what the halting is trained for (defaults: the paper's)."""

    gamma: float = 5.0
    beta: float = -10.0
    eps: Annotated[float, Meta(gt=0, lt=1)] = 0.01
    alpha_ponder: NotNegative = 5e-4  # alpha_p
    ponder_ramp: Fraction = (
        0.0  # fraction of training over which alpha_p grows linearly from 0; 0: full from the start
    )
    alpha_distr: NotNegative = 0.1  # alpha_d
    target_depth: Layers = 8.0  # mu, in layers
    target_std: Positive = 1.0
    kl_direction: Literal["paper", "code"] = "paper"  # KL(H || target); "code": KL(target || H)
    class_token_halts: bool = (
        True  # false (not in the paper): the class token runs to the last layer
    )
    projection: bool = (
        False  # true (not in the paper): the score is a learned projection, not channel 0
    )
    # "beta": channel 0 as the backbone has it; "class_attention" (not in the paper): fitted to
    # that, see ``starts.py``.
    start: Literal["beta", "class_attention"] = "beta"
    channel_rate: Fraction = (
        1.0  # of a fitted channel 0: its learning rate, as a part of that of all else; 0: held
    )

    def __post_init__(self):
        if self.channel_rate != 1 and not self.fitted:
            raise ValueError(
                "channel_rate is of a fitted channel 0; leave it out, or set start to class_attention"
            )

    @property
    def fitted(self) -> bool:
        """Whether channel 0 is fitted before training."""
        return self.start != "beta"

    @property
    def model_arguments(self) -> dict[str, Any]:
        """What the model itself needs, as arguments of ``timm.create_model``."""
        names = ("gamma", "beta", "eps", "class_token_halts", "projection")
        return {name: getattr(self, name) for name in names}

    @property
    def objective(self) -> dict[str, Any]:
        """What ``losses.AdaptiveLoss`` needs."""
        names = (
            "alpha_ponder",
            "ponder_ramp",
            "alpha_distr",
            "target_depth",
            "target_std",
            "kl_direction",
        )
        return {name: getattr(self, name) for name in names}


class Distillation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How closely a model follows the logits of the teacher that its run names."""

    alpha: NotNegative = 1.0  # weight in the objective, beside the cross-entropy's 1
    temperature: Positive = 1.0  # T


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
    distillation: Distillation = Distillation()  # of the teacher, if there is one

    def __post_init__(self):
        if "$" in self.label:
            raise ValueError(
                f"label {self.label!r}: figures take it for a formula; leave out the $"
            )
        if self.halting and self.saved:
            raise ValueError("it both halts and merges; leave out halting or saved")
        if bool(self.halting) != self.model.startswith("avit_"):
            raise ValueError(
                f"model {self.model!r} and halting: a model avit_* has that section, and no other has"
            )
        if self.init == "pretrained" and not self.pretrained:
            raise ValueError("init is pretrained; name the weights of timm's, as pretrained")
        if self.init == "pretrained" and self.halting and self.halting.projection:
            raise ValueError(
                "timm's weights have no projection; fine-tune a plain model first and name it as init"
            )
        warmup, epochs = self.training.warmup_epochs, self.training.epochs
        if warmup >= epochs:
            raise ValueError(
                f"warmup_epochs must be fewer than epochs, not {warmup:g} of {epochs}; change either"
            )

    @property
    def method(self) -> str:
        """Whose it is: "plain", "paper" (the published rule, no parameter added) or "ours"."""
        if self.halting is None:
            return "ours" if self.saved else "plain"
        return "paper" if self.halting.class_token_halts and not self.halting.projection else "ours"

    @property
    def start(self) -> str:
        """The name of the run whose weights it starts from; empty if it starts from none."""
        return "" if self.init == "pretrained" else self.init

    @property
    def needs(self) -> tuple[str, ...]:
        """The names of the runs that must be trained before it."""
        return tuple(name for name in (self.start, self.teacher) if name)

    def task_loss(self, teacher: Any = None) -> TaskLoss:
        """L_task of this run, with the trained model that teaches, if one does."""
        taught_by = teacher and Teacher(
            teacher, self.distillation.alpha, self.distillation.temperature
        )
        return TaskLoss(self.training.label_smoothing, taught_by)


class Profile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One study from data to results; profiles never share a results folder."""

    name: Name
    purpose: str
    data: Data
    runs: tuple[Run, ...]
    focus: str = "avit_finetuned"  # the run whose halting the notebooks look into
    smoke: bool = False  # only a check that everything runs
    recalibrated: dict[
        Name, tuple[Layers, ...]
    ] = {}  # mean depths to which beta of a run is set after training
    budgets: dict[
        Name, tuple[Saved, ...]
    ] = {}  # shares of FLOPs to which a run that merges is set after training
    merging: tuple[
        Annotated[int, Meta(ge=0)], ...
    ] = ()  # tokens that merge in each layer of a peer (``peers.tome``)
    sweep: tuple[str, ...] = ()  # runs that `make sweep` trains once for each of these seeds
    sweep_seeds: tuple[int, ...] = (0, 1, 2)
    licence: str = ""  # of the weights that `make release` writes
    notes: tuple[str, ...] = ()  # where the numbers come from, for the page of results

    def __post_init__(self):
        names, labels = [run.name for run in self.runs], [run.label for run in self.runs]
        if wrong := [label for label in labels if ", " in label or labels.count(label) > 1]:
            raise ValueError(
                f"label {wrong[0]!r}: tables need one without a comma, that no other run has"
            )
        kinds = {
            "recalibrated": "halting",
            "budgets": "saved",
        }  # what the runs named there must have
        meant = {"focus": (self.focus,), "sweep": self.sweep}
        meant |= {key: tuple(getattr(self, key)) for key in kinds}
        meant |= {f"{run.name}.init or teacher": run.needs for run in self.runs}
        for key, wanted in meant.items():
            if missing := [name for name in wanted if name not in names]:
                raise ValueError(f"{key} names {missing[0]!r}, but the runs are {', '.join(names)}")
        for key, kind in kinds.items():
            if wrong := [name for name in getattr(self, key) if not getattr(self.run(name), kind)]:
                raise ValueError(f"{key} names {wrong[0]!r}, a run without {kind}")
        try:
            TopologicalSorter({run.name: run.needs for run in self.runs}).prepare()
        except CycleError as error:
            raise ValueError(
                f"runs need each other in a circle: {', '.join(error.args[1])}"
            ) from None
        if not any(run.method == "plain" for run in self.runs):
            raise ValueError("runs: a plain one is missing, which the others are compared with")

    def run(self, name: str) -> Run:
        """The run called ``name``; raises UserError when there is none."""
        known = {run.name: run for run in self.runs}
        if name not in known:
            raise UserError(
                f"profile {self.name!r} has no run {name!r}; choose from {', '.join(known)}"
            )
        return known[name]

    def chain(self, name: str) -> tuple[Run, ...]:
        """The run called ``name`` after all those that it starts or learns from, directly or
        not.
        """
        needed = [run for need in self.run(name).needs for run in self.chain(need)]
        return tuple(dict.fromkeys([*needed, self.run(name)]))

    @property
    def plain(self) -> Run:
        """The run, neither halting nor merging, that the others are compared with."""
        return next(run for run in self.runs if run.method == "plain")


def profile_names() -> list[str]:
    """The profiles that come with the library."""
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def get_profile(name: str) -> Profile:
    """The profile called ``name``, or in the file ``name`` that ends in .toml, whose stem is then
    what it is called.

    Raises UserError, one line that names file and key, when it is missing or something in it is
    wrong.
    """
    path = _path(name, Path())
    if path.parent != PROFILES and path.stem in profile_names():
        raise UserError(
            f"{path} would share the results of the profile {path.stem}: give the file another name"
        )
    if "name" in (tables := _extended(path)):
        raise UserError(f"{path}: name: a profile is called like its file; leave it out")
    tables["name"] = path.stem
    shared = {section: tables.pop(section, {}) for section in ("training", "halting")}
    runs = {}  # by name, those of which a later one may say that it extends them
    for name, table in checked(path, "runs", tables.get("runs", {}), dict[str, dict]).items():
        runs[name] = _run(path, f"runs.{name}", table | {"name": name}, runs, shared)
    return checked(path, "", tables | {"runs": list(runs.values())}, Profile)


def changed(settings: Struct, key: str, **changes: Any) -> Any:
    """``settings`` with ``changes``, checked like a file; raises UserError naming ``key`` and what
    is wrong.
    """
    return checked("these settings", key, msgspec.to_builtins(settings) | changes, type(settings))


def _path(name: str, folder: Path, where: str = "") -> Path:
    path = folder / name if str(name).endswith(".toml") else PROFILES / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(profile_names())
        raise UserError(
            f"{where}unknown profile {str(name)!r}; choose from {known}, or name a file that ends in .toml"
        )
    return path.resolve()


def _extended(path: Path, *seen: Path) -> dict[str, Any]:
    """The tables of a file, laid over those of the profile it extends."""
    try:
        tables = msgspec.toml.decode(path.read_text("utf-8-sig"))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}; mend this line") from None
    base = tables.pop("extends", None)
    if path in seen:
        raise UserError(f"{path}: extends itself; leave that out")
    if base is None:
        return tables
    return laid_over(_extended(_path(base, path.parent, f"{path}: extends: "), path, *seen), tables)


def laid_over(base: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
    """``base`` with what ``tables`` say in its place; tables inside of them likewise."""
    inner = {
        name
        for name, value in tables.items()
        if isinstance(value, dict) and isinstance(base.get(name), dict)
    }
    return base | {
        name: laid_over(base[name], value) if name in inner else value
        for name, value in tables.items()
    }


def _run(
    path: Path, key: str, table: dict, runs: dict[str, dict], shared: dict[str, dict]
) -> dict[str, Any]:
    """A run as a complete table: over the run it extends, else over the sections that all share;
    checked.
    """
    extends = table.pop("extends", None)
    if extends not in (None, *runs):
        raise UserError(f"{path}: {key}.extends: there is no run {extends!r} before it")
    base = {"training": shared["training"]} if extends is None else runs[extends]
    if "halting" in table and not base.get("halting"):
        base = base | {"halting": shared["halting"]}
    return msgspec.to_builtins(checked(path, key, laid_over(base, table), Run))


def checked(path: Path | str, key: str, tables: dict[str, Any], kind: type) -> Any:
    """``tables`` as settings of a ``kind``; raises UserError that names ``path``, ``key`` and what
    is wrong.
    """
    try:
        return msgspec.convert(tables, kind)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$")
        key = f"{key}{place.rstrip('`')}".lstrip(".")
        raise UserError(f"{path}: {f'{key}: ' if key else ''}{what[0].lower()}{what[1:]}") from None
