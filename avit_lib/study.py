"""The study as the notebooks see it: one profile and seed, its data, its runs, its results."""

import ast
import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from avit_lib import distributed, evaluation
from avit_lib.checkpoints import create_model, load_checkpoint, load_pretrained, load_weights, read_json
from avit_lib.config import Run, StudyError, get_profile
from avit_lib.data import Images, TrainingData, loader, test_data, training_data
from avit_lib.losses import AdaptiveLoss, TaskLoss, Teacher, target_distribution
from avit_lib.redundancy import fit_channel, hold_channel
from avit_lib.reporting import Results
from avit_lib.training import finished_history, fit, pick_device, seed_everything

# A change in these, or in what they import, means training again.
TRAINING_MODULES = ("data", "losses", "models", "redundancy", "training")
FIT_IMAGES = 512  # training images on which the start of halting is fitted


class Study:
    """One profile and seed: ``train`` its runs, ``load`` their models, write ``results``."""

    def __init__(self, profile: str, seed: int = 0, source: str = "", device: str = "auto", checkpoints: str = ""):
        """``checkpoints`` names a subfolder for the checkpoints of this study, beside those of the main seed.

        Raises StudyError for a profile that does not exist or a device that is not there.
        """
        self.profile = get_profile(profile)
        self.seed = seed
        self.device = pick_device(device)
        self.results = Results(self.profile, seed, source)
        self.checkpoints = self.results.folder / "checkpoints" / checkpoints

    @cached_property
    def data(self) -> TrainingData:
        """Training and validation images."""
        return training_data(self.profile, self.seed)

    @cached_property
    def test(self) -> Images:
        """Test images; for the final evaluation only."""
        return test_data(self.profile, self.seed)

    def folder(self, run: str) -> Path:
        """Where the checkpoints of a run, or candidate of the search, lie."""
        found = self.profile.run(run)
        return self.checkpoints / ("" if found in self.profile.runs else "search") / found.name

    def train(self, name: str) -> pd.DataFrame:
        """Train the run called ``name``, or go on with it, or return the history of the finished one.

        What was trained by other settings, or by other code, is trained again from scratch.
        """
        run, folder = self.profile.run(name), self.folder(name)
        start, teacher = (self.checkpoint(needed) if needed else None for needed in (run.start, run.teacher))
        description = describe(run, self.data, start, teacher) | {
            "profile": self.profile.name,
            "code": fingerprint(sources(TRAINING_MODULES)),
        }
        found = folder / "last.json"
        first = distributed.rank() == 0
        if first and found.is_file() and read_json(found).get("run") != description | {"seed": self.seed}:
            print(f"{run.label}: settings or code changed since it was trained; training again", flush=True)
            shutil.rmtree(folder)
        distributed.barrier()  # the other processes see the folder as the first one left it
        taught_by = self.load(run.teacher) if teacher else None
        return train_run(run, self.data, folder, start, description, self.seed, self.device, taught_by)

    def train_chain(self, name: str) -> pd.DataFrame:
        """``train`` the runs that the one called ``name`` starts or learns from, then itself; returns its history."""
        for needed in self.profile.run(name).needs:
            self.train_chain(needed)
        return self.train(name)

    def initial_model(self, run: Run) -> nn.Module:
        """The model of a run as its training starts."""
        start = self.checkpoint(run.start) if run.start else None
        return initial_model(run, self.data, start, self.seed, self.device)

    def load(self, name: str) -> nn.Module:
        """The trained model of a run, after its last epoch; raises StudyError naming the command when it is missing."""
        return load_checkpoint(self.checkpoint(name), self.device)[0]

    def history(self, name: str) -> pd.DataFrame:
        """The training history of a run, one row an epoch."""
        return pd.read_csv(self.checkpoint(name).with_name("history.csv"))

    def predict(self, model: nn.Module, data: Images) -> evaluation.Predictions:
        """What ``model`` says of ``data``."""
        return evaluation.predict(model, data, device=self.device)

    def checkpoint(self, name: str) -> Path:
        """The trained weights of a run; raises StudyError naming the command when they are missing."""
        path = self.folder(name) / "last.safetensors"
        if not path.is_file():
            raise StudyError(
                f"{self.profile.run(name).label} has not been trained in profile {self.profile.name}: "
                f"run `make notebooks PROFILE={self.profile.name}`"
            )
        return path


def model_arguments(run: Run, classes: int) -> dict[str, Any]:
    """The arguments of ``timm.create_model`` for a run and a number of classes."""
    return {"num_classes": classes} | (run.halting.model_arguments if run.halting else {})


def describe(run: Run, data: TrainingData, start: Path | None, teacher: Path | None = None) -> dict[str, Any]:
    """What the checkpoints of a run depend on; runs that differ in it are different runs.

    ``start`` and ``teacher`` are the checkpoints it starts and learns from, if any.
    """
    return {
        "model": run.model,
        "arguments": model_arguments(run, len(data.train.classes)),
        "classes": list(data.train.classes),
        "settings": asdict(run),
        "images": [len(data.train), data.split["sha256"], data.augmentation],
        "start": read_json(start.with_suffix(".json"))["sha256"] if start else run.init,
        "teacher": read_json(teacher.with_suffix(".json"))["sha256"] if teacher else run.teacher,
    }


def initial_model(run: Run, data: TrainingData, start: Path | None, seed: int, device: torch.device) -> nn.Module:
    """The model of a run as its training starts: from the checkpoint ``start``, or as ``run.init`` says."""
    seed_everything(seed)
    model = create_model(run.model, model_arguments(run, len(data.train.classes)))
    if start is not None:
        load_weights(model, start)
    elif run.init == "pretrained":
        load_pretrained(model, run.pretrained)
    model.to(device)
    if run.halting and run.halting.fitted:
        images, _ = next(iter(loader(data.train, FIT_IMAGES, shuffle_seed=seed)))
        shares = target_distribution(run.halting.target_depth, run.halting.target_std, len(model.blocks))
        fit_channel(model, images.to(device), shares)
    return model


def train_run(
    run: Run,
    data: TrainingData,
    folder: Path,
    start: Path | None,
    description: dict[str, Any],
    seed: int,
    device: torch.device,
    teacher: nn.Module | None = None,
) -> pd.DataFrame:
    """Train a run into ``folder`` by its settings (see ``training.fit``); returns the history, one row an epoch.

    ``teacher`` is the model it learns from, in evaluation mode; raises StudyError when the run wants one and has none.
    """
    if run.teacher and teacher is None:
        raise StudyError(
            f"{run.label} learns from the run {run.teacher!r}: train it by `make notebooks` of its profile"
        )
    history = finished_history(folder, description | {"seed": seed}, run.training)
    if history is not None:  # before a start is fitted for nothing
        return history
    taught_by = None if teacher is None else Teacher(teacher, run.distillation)
    model = initial_model(run, data, start, seed, device)
    if run.halting:
        if run.halting.fitted:
            hold_channel(model)
        model.execution = run.training.execution
        loss = AdaptiveLoss(run.halting, run.training.label_smoothing, taught_by)
    else:
        loss = TaskLoss(run.training.label_smoothing, taught_by)

    def validate(trained: nn.Module) -> dict[str, float]:
        return evaluation.metrics(trained, evaluation.predict(trained, data.validation, device=device))

    return fit(
        model, data.train, loss, run.training, folder, validate, description=description, seed=seed, device=device
    )


def sources(modules: Iterable[str]) -> list[Path]:
    """The files of avit_lib that ``modules`` consist of and import, directly or not.

    The profiles (config) are left out: their values count, not their text.
    """
    package = Path(__file__).parent
    found, waiting = {}, list(modules)
    while waiting:
        module = waiting.pop()
        path = package / f"{module}.py"
        if module in found or module == "config" or not path.is_file():
            continue
        found[module] = path
        waiting += imported_modules(path.read_text())
    return [found[module] for module in sorted(found)]


def imported_modules(code: str) -> set[str]:
    """The modules of avit_lib that Python ``code`` imports, by their names inside the package."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "avit_lib":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("avit_lib."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("avit_lib.")}
    return names


def fingerprint(files: Iterable[Path]) -> str:
    """A short hash of the contents of ``files``."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
