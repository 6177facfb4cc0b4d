"""The study as the notebooks see it: one profile and seed, its data, its models, its results."""

import shutil
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
from torch import Tensor, nn

from avit_lib import evaluation, training
from avit_lib.adaptive import adapt
from avit_lib.data import Images, TrainingData, loader, test_data, training_data
from avit_lib.errors import UserError
from avit_lib.losses import AdaptiveLoss, TaskLoss, Teacher, target_distribution
from avit_lib.starts import fit_start, scale_channel_rate
from avit_lib.study.results import Results, results_dir
from avit_lib.study.settings import Run, get_profile
from avit_lib.training import processes, read_json

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
        """``source`` names the notebook; ``checkpoints`` a subfolder for those of this seed.

        Raises UserError for a profile that does not exist or a device that is not there.
        """
        self.profile = get_profile(profile)
        self.seed = seed
        self.device = training.pick_device(device)
        self.results = Results(self.profile.name, seed, source)
        self.checkpoints = self.results.folder / "checkpoints" / checkpoints

    @cached_property
    def data(self) -> TrainingData:
        """Training and validation images."""
        return training_data(self.profile.data, self.seed)

    @cached_property
    def test(self) -> Images:
        """Test images; for the final evaluation only."""
        return test_data(self.profile.data, self.seed)

    def folder(self, run: str) -> Path:
        """Where the checkpoints of a run lie."""
        return self.checkpoints / self.profile.run(run).name

    def train(self, name: str) -> pd.DataFrame:
        """Train a run, or go on with it, or return the history of the finished one.

        What was trained by other settings, or on other images, is trained again from scratch.
        """
        run, folder = self.profile.run(name), self.folder(name)
        needed = (run.start, run.teacher)
        start, teacher = (self.checkpoint(one) if one else None for one in needed)
        known, wanted = folder / "last.json", self.describe(run, start, teacher)
        if processes.rank() == 0 and known.is_file() and read_json(known).get("run") != wanted:
            print(f"{run.label}: its settings or images changed; training again", flush=True)
            shutil.rmtree(folder)
        processes.barrier()  # the others see the folder as the first one left it
        return self.train_into(folder, run, start, teacher)

    def train_chain(self, name: str) -> pd.DataFrame:
        """``train`` the runs that one starts or learns from, then itself; returns its history."""
        run = self.profile.run(name)
        for needed in dict.fromkeys((run.start, run.teacher)):
            if needed:
                self.train_chain(needed)
        return self.train(name)

    def describe(self, run: Run, start: Path | None, teacher: Path | None) -> dict[str, Any]:
        """What the checkpoints of a run depend on; runs that differ in it are different runs.

        ``start`` and ``teacher`` are the checkpoints it starts and learns from, if any.
        """
        data = self.data
        arguments = {"num_classes": len(data.train.classes), "img_size": data.image_size}
        return {
            "model": run.model,
            "arguments": arguments | (run.halting.model_arguments if run.halting else {}),
            "classes": list(data.train.classes),
            "settings": msgspec.to_builtins(run),
            "images": [data.split["sha256"], data.split["content"], data.augmentation],
            "start": read_json(start.with_suffix(".json"))["sha256"] if start else "",
            "teacher": read_json(teacher.with_suffix(".json"))["sha256"] if teacher else "",
            "seed": self.seed,
        }

    def initial_model(self, run: Run, start: Path | None = None) -> nn.Module:
        """The model of a run as its training starts, by default from the study's own checkpoint."""
        if run.start and not start:
            start = self.checkpoint(run.start)
        training.seed_everything(self.seed)
        model = training.create_model(run.model, self.describe(run, None, None)["arguments"])
        if start:
            training.load_weights(model, start)
        else:
            training.load_pretrained(model, run.pretrained)
        model.to(self.device)
        if run.saved:
            model = adapt(model, self._fit_images(), run.saved)
        if run.halting and run.halting.fitted:
            wanted = run.halting.target_depth, run.halting.target_std
            halting = target_distribution(*wanted, len(model.blocks))
            fit_start(model, self._fit_images(), halting)
        return model

    def _fit_images(self) -> Tensor:
        """Training images [B, C, H, W] on which a start is fitted, drawn by the seed."""
        batches = loader(self.data.train, FIT_IMAGES, shuffle_seed=self.seed)
        return next(iter(batches))[0].to(self.device)

    def train_into(
        self, folder: Path, run: Run, start: Path | None, teacher: Path | None
    ) -> pd.DataFrame:
        """Train a run into ``folder`` (see ``training.fit``); returns its history, a row an epoch.

        ``start`` and ``teacher`` are the checkpoints it starts and learns from. Raises UserError
        when one of them knows other classes, or when ``folder`` holds another run.
        """
        description = self.describe(run, start, teacher)
        history = training.finished_history(folder, description, run.training)
        if history is not None:  # before a start is fitted for nothing
            return history
        for path in filter(None, (start, teacher)):
            classes = read_json(path.with_suffix(".json")).get("run", {}).get("classes")
            if classes not in (None, description["classes"]):
                raise UserError(f"{path} knows other classes than the training images")
        taught_by = training.load_checkpoint(teacher, self.device)[0] if teacher else None
        model = self.initial_model(run, start)
        teaching = taught_by and Teacher(taught_by, run.distillation)
        task = TaskLoss(run.training.label_smoothing, teaching)
        loss: TaskLoss | AdaptiveLoss = task
        adjust = None
        if run.halting:
            model.execution = run.training.execution
            loss = AdaptiveLoss(**run.halting.objective, task=task, average=processes.mean)
            if run.halting.fitted:
                adjust = partial(scale_channel_rate, model, rate=run.halting.channel_rate)

        def validate(trained: nn.Module) -> dict[str, float]:
            return evaluation.metrics(self.predict(trained, self.data.validation))

        return training.fit(
            model,
            self.data.train,
            loss,
            run.training,
            folder,
            validate,
            description=description,
            seed=self.seed,
            device=self.device,
            adjust=adjust,
        )

    def load(self, name: str) -> nn.Module:
        """The trained model of a run, after its last epoch; UserError when it is missing."""
        return training.load_checkpoint(self.checkpoint(name), self.device)[0]

    def predict(self, model: nn.Module, data: Images) -> evaluation.Predictions:
        """What ``model`` says of ``data``."""
        return evaluation.predict(model, data, device=self.device)

    def checkpoint(self, name: str) -> Path:
        """The weights of a run after its last epoch; UserError, naming the command, if missing."""
        run, path = self.profile.run(name), self.folder(name) / "last.safetensors"
        described = path.with_suffix(".json")
        if path.is_file() and read_json(described)["epoch"] == run.training.epochs:
            return path
        raise UserError(
            f"{run.label} has not been trained to the end in profile {self.profile.name}: run "
            f"`make reproduce`, or `python -m avit_lib fit --model {name}`, with this profile"
        )


def released(profile: str, run: str) -> Path:
    """Where the committed model of a run lies, if there is one (see ``scripts/release.py``)."""
    return results_dir(profile) / "models" / f"{run}.safetensors"
