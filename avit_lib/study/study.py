"""The study as the notebooks see it: one profile and seed, its data, its models, its results."""

import shutil
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import torch
from torch import Tensor, nn

from avit_lib import evaluation, training
from avit_lib.adaptive import Adaptive, adapt
from avit_lib.data import Images, TrainingData, images, loader, test_data, training_data
from avit_lib.errors import UserError
from avit_lib.losses import AdaptiveLoss, TaskLoss, target_distribution
from avit_lib.model import AViT, register, run_masked
from avit_lib.packed import run_packed
from avit_lib.starts import fit_start, scale_channel_rate
from avit_lib.study.fingerprint import fingerprint
from avit_lib.study.results import Results, results_dir, show_tables_rounded
from avit_lib.study.settings import Run, get_profile
from avit_lib.training import loop, processes, read_json

FIT_IMAGES = 512


class Study:
    """One profile and seed: ``train`` its runs, ``load`` their models, write ``results``."""

    def __init__(
        self,
        profile: str,
        seed: int = 0,
        source: str = "",
        device: str = "auto",
        checkpoints: str = "",
    ):
        """``checkpoints`` names a subfolder for the checkpoints of this study, beside those of the
        main seed.

        Raises UserError for a profile that does not exist or a device that is not there.
        """
        self.profile = get_profile(profile)
        self.seed = seed
        self.device = training.pick_device(device)
        self.results = Results(self.profile.name, seed, source)
        show_tables_rounded()
        self.checkpoints = Path("checkpoints", checkpoints)

    @cached_property
    def data(self) -> TrainingData:
        """Training and validation images."""
        return training_data(self.profile.data, self.seed)

    @cached_property
    def test(self) -> Images:
        """Test images; for the final evaluation only."""
        return test_data(self.profile.data, self.seed)

    def folder(self, run: str) -> Path:
        """Where the checkpoints of a run lie: aside, if a notebook by hand trained it."""
        aside, usual = self._folders(run)
        return aside if aside.is_dir() else usual

    def _folders(self, run: str) -> tuple[Path, Path]:
        place = self.checkpoints / self.profile.run(run).name
        return self.results.folder / place, results_dir(self.profile.name) / place

    def train(self, name: str) -> pd.DataFrame:
        """Train the run called ``name``, or go on with it, or return the history of the finished
        one.

        What was trained by other settings, or by other code, is trained again from scratch; in a
        notebook run by hand aside, so that nothing committed is lost.
        """
        run = self.profile.run(name)
        start, teacher = (
            self.checkpoint(needed) if needed else None for needed in (run.start, run.teacher)
        )
        description = describe(run, self.data, start, teacher)
        description |= {
            "profile": self.profile.name,
            "code": fingerprint(*ingredients(run)),
            "seed": self.seed,
        }
        aside, usual = self._folders(name)

        def another(folder: Path) -> bool:
            found = folder / "last.json"
            return found.is_file() and read_json(found).get("run") != description

        if processes.rank() == 0 and another(self.folder(name)):
            print(
                f"{run.label}: settings or code changed since it was trained; training again",
                flush=True,
            )
            shutil.rmtree(aside, ignore_errors=True)
        processes.barrier()  # the other processes see the folder as the first one left it
        folder = aside if another(usual) else self.folder(name)
        return train_run(
            run, self.data, folder, start, teacher, self.seed, self.device, description
        )

    def train_chain(self, name: str) -> pd.DataFrame:
        """``train`` the runs that the one called ``name`` starts or learns from, then itself;
        returns its history.
        """
        return [self.train(run.name) for run in self.profile.chain(name)][-1]

    def initial_model(self, run: Run) -> nn.Module:
        """The model of a run as its training starts."""
        start = self.checkpoint(run.start) if run.start else None
        return initial_model(run, self.data, start, self.seed, self.device)

    def load(self, name: str) -> nn.Module:
        """The trained model of a run, after its last epoch; raises UserError naming the command
        when it is missing.
        """
        return training.load_checkpoint(self.checkpoint(name), self.device)[0]

    def predict(self, model: nn.Module, data: Images) -> evaluation.Predictions:
        """What ``model`` says of ``data``."""
        return predict(model, data, self.device)

    def checkpoint(self, name: str) -> Path:
        """The weights of a run after its last epoch; raises UserError naming the command when they
        are missing.
        """
        run, path = self.profile.run(name), self.folder(name) / "last.safetensors"
        if (
            not path.is_file()
            or read_json(path.with_suffix(".json"))["epoch"] != run.training.epochs
        ):
            raise UserError(
                f"{run.label} has not been trained to the end in profile {self.profile.name}: "
                f"run `make notebooks PROFILE={self.profile.name}`"
            )
        return path


def ingredients(run: Run) -> list[Any]:
    """The code that decides on the weights of a run; a change in it, or in what it uses, means
    training again.
    """
    code = [images.decode, images.batch_transform, images.Images, images.ImageFiles, register]
    code += [training.load_pretrained] if run.init == "pretrained" else []
    code += [
        training.seed_everything,
        loop.prepared,
        loop.train_epoch,
        AdaptiveLoss if run.halting else TaskLoss,
    ]
    if run.halting:
        code += [AViT.__init__, AViT.embed, AViT.rule]
        code += [
            AViT._load_from_state_dict,
            run_packed if run.training.execution == "packed" else run_masked,
        ]
        if run.halting.fitted:
            code += [fit_start, scale_channel_rate, fit_images]
    code += [adapt, Adaptive, fit_images] if run.saved else []
    return code


def describe(
    run: Run, data: TrainingData, start: Path | None, teacher: Path | None = None
) -> dict[str, Any]:
    """What the checkpoints of a run depend on; runs that differ in it are different runs.

    ``start`` and ``teacher`` are the checkpoints it starts and learns from, if any.
    """
    return {
        "model": run.model,
        "arguments": model_arguments(run, data),
        "classes": list(data.train.classes),
        "settings": msgspec.to_builtins(run),
        "images": [len(data.train), data.split["sha256"], data.split["content"], data.augmentation],
        "start": read_json(start.with_suffix(".json"))["sha256"] if start else run.init,
        "teacher": read_json(teacher.with_suffix(".json"))["sha256"] if teacher else run.teacher,
    }


def model_arguments(run: Run, data: TrainingData) -> dict[str, Any]:
    """The arguments of ``timm.create_model`` for a run on these images."""
    own = {"num_classes": len(data.train.classes), "img_size": data.image_size}
    return own | (run.halting.model_arguments if run.halting else {})


def initial_model(
    run: Run, data: TrainingData, start: Path | None, seed: int, device: torch.device
) -> nn.Module:
    """The model of a run as its training starts: from the checkpoint ``start``, or as ``run.init``
    says.
    """
    training.seed_everything(seed)
    model = training.create_model(run.model, model_arguments(run, data))
    if start is not None:
        training.load_weights(model, start)
    else:
        training.load_pretrained(model, run.pretrained)
    model.to(device)
    if run.saved:
        model = adapt(model, fit_images(data, seed).to(device), run.saved)
    if run.halting and run.halting.fitted:
        halting = target_distribution(
            run.halting.target_depth, run.halting.target_std, len(model.blocks)
        )
        fit_start(model, fit_images(data, seed).to(device), halting)
    return model


def fit_images(data: TrainingData, seed: int) -> Tensor:
    """The training images [B, C, H, W] on which a start is fitted or thresholds are set, drawn by
    the seed.
    """
    return next(iter(loader(data.train, FIT_IMAGES, shuffle_seed=seed)))[0]


def train_run(
    run: Run,
    data: TrainingData,
    folder: Path,
    start: Path | None,
    teacher: Path | None,
    seed: int,
    device: torch.device,
    description: dict[str, Any] | None = None,
) -> pd.DataFrame:
    """Train a run into ``folder`` by its settings (see ``training.fit``); returns the history, one
    row an epoch.

    ``start`` and ``teacher`` are the checkpoints it starts and learns from; raises UserError when
    one is missing, or not wanted, or knows other classes. ``description`` tells this run from
    others (default: as ``describe`` has it).
    """
    for option, needed, given in (
        ("--ckpt", run.start, start),
        ("--teacher", run.teacher, teacher),
    ):
        if needed and not given:
            raise UserError(
                f"run {run.name!r} starts or learns from run {needed!r}: name its weights by {option}"
            )
    if teacher and not run.teacher:
        raise UserError(f"run {run.name!r} has no teacher; leave out --teacher")
    description = (description or describe(run, data, start, teacher)) | {"seed": seed}
    history = training.finished_history(folder, description, run.training)
    if history is not None:  # before a start is fitted for nothing
        return history
    for path in (start, teacher):
        known = read_json(path.with_suffix(".json")) if path else {}
        classes = known.get("run", {}).get("classes", description["classes"])
        if classes != description["classes"]:
            raise UserError(
                f"{path} was trained for other classes than those of the training images"
            )
        if known.get("arguments", {}).get("img_size", data.image_size) != data.image_size:
            raise UserError(
                f"{path} was trained for images of another size than {data.image_size} pixels"
            )
    taught_by = training.load_checkpoint(teacher, device)[0] if teacher else None
    model = initial_model(run, data, start, seed, device)
    loss, adjust = run.task_loss(taught_by), None
    if run.halting:
        if run.halting.fitted:
            adjust = partial(scale_channel_rate, model, rate=run.halting.channel_rate)
        model.execution = run.training.execution
        loss = AdaptiveLoss(**run.halting.objective, task=loss, average=processes.mean)

    def validate(trained: nn.Module) -> dict[str, float]:
        return evaluation.metrics(trained, predict(trained, data.validation, device))

    return training.fit(
        model,
        data.train,
        loss,
        run.training,
        folder,
        validate,
        description=description,
        seed=seed,
        device=device,
        adjust=adjust,
    )


def predict(
    model: nn.Module, data: Images, device: torch.device, batch_size: int = 250
) -> evaluation.Predictions:
    """``evaluation.predict``, of which each of several processes computes a part and gets the
    whole.
    """
    if processes.count() == 1:
        return evaluation.predict(model, data, batch_size, device)
    own = evaluation.predict(model, data.select(processes.part(len(data))), batch_size, device)
    parts = (own.logits, own.labels, own.depth, own.halting_scores)
    return evaluation.Predictions(
        *(processes.gather(part, len(data)) for part in parts), own.layers
    )
