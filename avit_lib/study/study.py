"""The study as the notebooks see it: one profile and seed, its data, its models, its results."""

import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import timm
import torch
from torch import Tensor, nn

from avit_lib import evaluation, training
from avit_lib.adaptive import adapt
from avit_lib.data import (
    STATISTICS,
    Images,
    TrainingData,
    are_imagenets,
    loader,
    test_data,
    training_data,
)
from avit_lib.errors import UserError
from avit_lib.losses import AdaptiveLoss, TaskLoss, target_distribution
from avit_lib.places import digest_file, list_embedded, weights_path
from avit_lib.starts import fit_start, scale_channel_rate
from avit_lib.study.kept import digest_images, digest_model, keep, read_kept
from avit_lib.study.results import Results, results_dir
from avit_lib.study.settings import Profile, Run, get_profile
from avit_lib.training import processes, read_json

FIT_IMAGES = 256


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

        Its clock starts. Raises UserError for a device that is not there.
        """
        self.name = profile
        self.seed = seed
        self.device = training.pick_device(device)
        self.checkpoints = checkpoints
        self._made_by = source, time.perf_counter()

    @cached_property
    def profile(self) -> Profile:
        """Its settings; raises UserError for a profile that does not exist, or is wrong."""
        return get_profile(self.name)

    @cached_property
    def results(self) -> Results:
        """Where its results are written."""
        return Results(self.profile.name, self.seed, *self._made_by)

    @cached_property
    def data(self) -> TrainingData:
        """Training and validation images."""
        return training_data(self.profile.data, self.seed)

    @cached_property
    def test(self) -> Images:
        """Test images; for the final evaluation only."""
        return test_data(self.profile.data, self.seed)

    @property
    def test_names(self) -> Sequence:
        """The names of the test images; numbers in a data set that has no files."""
        return self.data.split["files"].get("test", range(len(self.test)))

    def from_seeds(self) -> dict[int, "Study"]:
        """This study from each seed under ``sweep_seeds``; others than its own in a folder each."""
        seeds = self.profile.sweep_seeds
        others = {seed: Study(self.name, seed, checkpoints=f"seed{seed}") for seed in seeds}
        return others | ({self.seed: self} if self.seed in seeds else {})

    @property
    def seed_words(self) -> str:
        """Which seeds ``from_seeds`` has, in words."""
        seeds = self.profile.sweep_seeds
        return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"

    def find(self, run: str | Run) -> Run:
        """A run of the profile, by its name; or one that stands beside them, as it is."""
        return self.profile.run(run) if isinstance(run, str) else run

    def folder(self, run: str | Run) -> Path:
        """Where the checkpoints of a run lie."""
        checkpoints = self.results.folder / "checkpoints" / self.checkpoints
        return checkpoints / self.find(run).name

    def train(self, run: str | Run) -> pd.DataFrame:
        """Train a run after those it starts or learns from; returns its history.

        An interrupted training goes on, a finished one is kept. What was trained by other settings,
        or on other images, is trained again from scratch.
        """
        run, folder = self.find(run), self.folder(run)
        for before in (run.start, run.teacher):
            if before:
                self.train(before)
        clear_other(folder, self.describe(run, *self.needed(run)))
        return self.train_into(folder, run)

    def needed(
        self, run: Run, start: Path | None = None, teacher: Path | None = None
    ) -> list[Path | None]:
        """The checkpoints that a run starts and learns from: those given, else the study's."""
        pairs = (start, run.start), (teacher, run.teacher)
        return [path or (self.checkpoint(name) if name else None) for path, name in pairs]

    def describe(
        self, run: Run, start: Path | None = None, teacher: Path | None = None
    ) -> dict[str, Any]:
        """What the checkpoints of a run depend on; runs that differ in it are different runs.

        ``start`` and ``teacher`` are the checkpoints it starts and learns from, if any.
        """
        data = self.data
        images = [data.split["sha256"], data.split["content"], data.augmentation]
        before = [read_json(p.with_suffix(".json")) if p else {} for p in (start, teacher)]
        known = [one.get("run", {}) for one in before]
        # They may know the test images beside these.
        others = [one["images"] for one in known if one.get("images", images)[:2] != images[:2]]
        others += [one["others"] for one in known if "others" in one]
        arguments = {"num_classes": len(data.train.classes), "img_size": data.image_size}
        return {
            "model": run.model,
            "arguments": arguments | (run.halting.model_arguments if run.halting else {}),
            "classes": list(data.train.classes),
            "settings": msgspec.to_builtins(run),
            "images": images,
            "start": before[0]["sha256"] if start else pretrained(run),
            "teacher": before[1]["sha256"] if teacher else "",
            "seed": self.seed,
        } | ({"others": others} if others else {})

    def initial_model(self, run: Run, start: Path | None = None) -> nn.Module:
        """The model of a run as its training starts, by default from the study's own checkpoint."""
        training.seed_everything(self.seed)
        model = training.create_model(run.model, self.describe(run)["arguments"])
        if run.start or start:
            training.load_weights(model, start or self.checkpoint(run.start))
        else:
            check_statistics(run.pretrained)
            known, classes = timm.get_pretrained_cfg(run.pretrained), self.data.train.classes
            same = are_imagenets(classes) and known and known.num_classes == len(classes)
            training.load_pretrained(model, run.pretrained, new_head=not same)
        model.to(self.device)
        halting = run.halting
        if run.saved or (halting and halting.fitted):
            batches = loader(self.data.train, FIT_IMAGES, shuffle_seed=self.seed)
            images = next(iter(batches))[0].to(self.device)
            if run.saved:
                return adapt(model, images, run.saved)
            wanted = halting.target_depth, halting.target_std
            fit_start(model, images, target_distribution(*wanted, len(model.blocks)))
        return model

    def train_into(
        self, folder: Path, run: Run, start: Path | None = None, teacher: Path | None = None
    ) -> pd.DataFrame:
        """Train a run into ``folder`` (see ``training.fit``); returns its history, a row an epoch.

        ``start`` and ``teacher``: checkpoints that it starts and learns from, in place of the
        study's. Raises UserError when one of them knows other classes, or when ``folder`` holds
        another run.
        """
        start, teacher = self.needed(run, start, teacher)
        description = self.describe(run, start, teacher)
        history = training.finished_history(folder, description, run.training)
        if history is not None:  # before a start is fitted for nothing
            print(f"{folder} holds this run, trained before: kept", flush=True)
            return history
        for path in filter(None, (start, teacher)):
            classes = training.read_description(path).get("run", {}).get("classes")
            if classes not in (None, description["classes"]):
                raise UserError(f"{path} knows other classes than the training images")
        model = self.initial_model(run, start)
        taught_by = training.load_checkpoint(teacher, self.device)[0] if teacher else None
        if taught_by and taught_by.patch_embed.img_size != model.patch_embed.img_size:
            raise UserError(f"{teacher} sees images of another size; name another --teacher")
        task = TaskLoss(run.training.label_smoothing, taught_by, run.distillation)
        loss: TaskLoss | AdaptiveLoss = task
        adjust = None
        if run.halting:
            # In bfloat16 a CPU makes a kernel for each number of tokens: to train, masks cost less.
            masks = self.device.type == "cpu" and training.uses_bfloat16(run.training, self.device)
            model.execution = "auto" if masks else "packed"
            model.task_gradient = run.halting.task_gradient
            loss = AdaptiveLoss(**run.halting.objective, task=task, average=processes.mean)
            if run.halting.fitted:
                adjust = partial(scale_channel_rate, model, rate=run.halting.channel_rate)
        return training.fit(
            model,
            self.data.train,
            loss,
            run.training,
            folder,
            lambda trained: evaluation.metrics(self.predict(trained, self.data.validation)),
            description=description,
            seed=self.seed,
            device=self.device,
            adjust=adjust,
        )

    def count_steps(self, config: training.Training) -> int:
        """How many steps a training of these settings takes."""
        return config.epochs * training.count_updates(self.data.train, config)

    def load(self, run: str | Run) -> nn.Module:
        """The trained model of a run, after its last epoch; UserError when it is missing."""
        return training.load_checkpoint(self.checkpoint(run), self.device)[0]

    def predict(self, model: nn.Module, data: Images) -> evaluation.Predictions:
        """What ``model`` says of ``data``."""
        return evaluation.predict(model, data, device=self.device)

    def predict_test(self, label: str, model: nn.Module) -> evaluation.Predictions:
        """What ``model`` says of the test images, without halting scores: computed only once.

        Kept beside the checkpoints, unless images are decoded when they are needed; read back while
        ``label``, weights, images, device and library are the same. ``label`` has to say what no
        weight does, such as r.
        """
        if not isinstance(self.test.images, Tensor):  # files, which may change
            return self._predict_test(model)
        of = f"{label}, {self.device.type}: {self._test_digest} {digest_model(model)}"
        folder = self.results.folder / "checkpoints" / self.checkpoints / "predictions"
        words = re.sub(r"\W+", "_", label)
        path = folder / f"{words}.safetensors"
        found = read_kept(path, of)
        if found is None:
            found = self._predict_test(model)
            keep(path, found, of)
        return found

    def _predict_test(self, model: nn.Module) -> evaluation.Predictions:
        return replace(self.predict(model, self.test), halting_scores=torch.empty(0))

    @cached_property
    def _test_digest(self) -> str:
        return digest_images(self.test)

    def checkpoint(self, run: str | Run) -> Path:
        """The weights of a run after its last epoch.

        Raises UserError, naming the command, when they are missing or of other settings or images.
        """
        run, path = self.find(run), self.folder(run) / "last.safetensors"
        fault = "has not been trained to the end"
        if path.is_file():
            found = read_json(path.with_suffix(".json"))
            if found.get("run") != self.describe(run, *self.needed(run)):
                fault = "has settings or images that changed since it was trained"
            elif found["epoch"] == run.training.epochs:
                return path
        raise UserError(
            f"{run.label} {fault}, in profile {self.profile.name}: run `make reproduce`, or "
            f"`python -m avit_lib fit --model {run.name}`, with this profile; or name a checkpoint "
            f"by --ckpt or --teacher"
        )


def pretrained(run: Run) -> str:
    """The checksum of the weights that a run starts from, if somebody brings other ones.

    Those of the repository, or of timm's hub, are the same but for rounding to float16.
    """
    if run.start:
        return ""
    given = weights_path(run.pretrained)
    own = os.environ.get("AVIT_WEIGHTS") or not list_embedded(given)
    return digest_file(given) if own and given.is_file() else ""


def check_statistics(pretrained: str) -> None:
    """Raise UserError for weights of timm's that expect images normalised in another way."""
    known = timm.get_pretrained_cfg(pretrained)
    if known and (known.mean, known.std) != STATISTICS:
        raise UserError(
            f"{pretrained} expects images of mean {known.mean} and deviation {known.std}, and a "
            f"study gives those of ImageNet; choose other weights"
        )


def clear_other(folder: Path, wanted: dict[str, Any]) -> None:
    """Remove a ``folder`` of checkpoints unless they are of the run that ``wanted`` describes."""
    known = folder / "last.json"
    if processes.rank() == 0 and known.is_file() and read_json(known).get("run") != wanted:
        print(f"{folder.name}: its settings or images changed; training again", flush=True)
        with training.only_one(folder):
            shutil.rmtree(folder)
    processes.barrier()  # the others see the folder as the first one left it


def released(profile: str, run: str) -> Path:
    """Where the committed model of a run lies, if there is one (see ``scripts/release.py``)."""
    return results_dir(profile) / "models" / run / "model.safetensors"
