"""One training loop for every model; it knows of halting only what its loss function returns."""

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from msgspec import Meta, Struct
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from tqdm.auto import tqdm

from avit_lib.data import Images, loader
from avit_lib.errors import UserError, fitting_memory
from avit_lib.losses import Losses
from avit_lib.training import processes
from avit_lib.training.checkpoints import save_checkpoint
from avit_lib.training.files import (
    make_writable,
    read_json,
    read_state,
    write_atomically,
    write_state,
)

OPTIMIZERS = ("adamw", "lamb", "sgd")  # of timm's
_TOLD = (
    "train_loss",
    "val_accuracy",
    "val_mean_depth",
    "seconds",
)  # of an epoch, in one line; all: history.csv
RESUME, PREVIOUS = (
    "resume.pt",
    "resume_previous.pt",
)  # the state after the last finished epoch, and the one before it

Loss = Callable[
    [nn.Module, torch.Tensor, torch.Tensor, float], Losses
]  # model, images, labels, progress 0..1

Positive, Fraction = Annotated[float, Meta(gt=0, le=1e6)], Annotated[float, Meta(ge=0, lt=1)]
NotNegative = Annotated[float, Meta(ge=0, le=1e6)]
Count = Annotated[int, Meta(ge=1, lt=2**31)]


class Training(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model is trained, with linear warm-up and a cosine to zero: the section ``training`` of
    a profile.
    """

    epochs: Count
    learning_rate: Positive
    batch_size: Count = 64  # of all processes together
    weight_decay: NotNegative = 0.05
    warmup_epochs: NotNegative = 0.5
    label_smoothing: Fraction = 0.1
    clip_norm: Positive = 1.0
    precision: Literal["float32", "bfloat16"] = (
        "float32"  # "bfloat16": autocast, where the device gains by it
    )
    optimizer: str = "adamw"  # one of OPTIMIZERS
    execution: Literal["auto", "masked", "packed"] = (
        "auto"  # of a model that halts, in training: "auto" is masked
    )
    ema_decay: Fraction = (
        0.0  # of the averaged weights, which are then those evaluated and kept; 0: none
    )
    mixup: NotNegative = 0.0  # alpha of Mixup; 0: none
    cutmix: NotNegative = 0.0  # alpha of CutMix; 0: none; with both, each batch takes one of them

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"there is no optimizer {self.optimizer!r}; choose from {', '.join(OPTIMIZERS)}"
            )


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_device(name: str = "auto") -> torch.device:
    """The device called "cpu", "gpu" or "auto" (a GPU if there is one); raises UserError when it is
    not there.
    """
    if name not in ("cpu", "gpu", "auto"):
        raise UserError(f"unknown device {name!r}; choose from cpu, gpu, auto")
    if name == "gpu" and not torch.cuda.is_available():
        raise UserError("no CUDA GPU is visible; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def gains_by_bfloat16(device: torch.device) -> bool:
    """Whether the device is faster in bfloat16: a CPU only if it multiplies in it (AMX or
    AVX512-BF16).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


@dataclass(frozen=True)
class _State:
    """What training changes; the state of the schedule follows from the number of epochs, of all
    else from the seed.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    schedule: CosineLRScheduler
    mix: Mixup | None
    records: list[dict]  # one a finished epoch

    @property
    def result(self) -> nn.Module:
        """The model that is evaluated and kept: the averaged one, if there is one."""
        return self.ema.module if self.ema else self.model

    @property
    def stateful(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """What has a state of its own to be saved, beside the records."""
        return {"model": self.model, "optimizer": self.optimizer} | (
            {"ema": self.ema.module} if self.ema else {}
        )


def fit(
    model: nn.Module,
    train: Images,
    loss: Loss,
    config: Training,
    output: Path,
    validate: Callable[[nn.Module], dict[str, float]],
    *,
    description: dict,
    seed: int = 0,
    device: torch.device | str = "cpu",
    adjust: Callable[[torch.optim.Optimizer], None] | None = None,
) -> pd.DataFrame:
    """Train ``model`` and return its history, one row an epoch.

    ``validate`` returns the metrics of a model, among them "accuracy". Into ``output`` go last and
    best.safetensors (best by validation accuracy), history.csv and the resume state; an interrupted
    run resumes from there, a finished one returns at once. ``description`` (model, arguments, ...)
    goes into the JSON of each checkpoint. ``adjust`` gets the optimizer before the first step.
    Raises UserError when another description lies in ``output``, when nothing can be written there,
    when memory does not suffice and when the loss is no longer finite: then the checkpoints of the
    last finished epoch stay.
    """
    device, output, run = torch.device(device), Path(output), description | {"seed": seed}
    history = finished_history(output, run, config)
    if history is not None:
        return history
    if len(train.classes) < 2:
        raise UserError(
            f"all training images are of class {train.classes[0]!r}: add a folder of another class"
        )
    _check_shares(config, len(train))
    make_writable(output)
    model.to(device)
    state = prepared(
        model, config, len(train.classes), len(loader(train, config.batch_size, shuffle_seed=0))
    )
    if adjust:
        adjust(state.optimizer)
    _resume(output, state, run, device)
    processes.barrier()  # until here all processes only read
    if (
        state.records and processes.rank() == 0
    ):  # the machine may have stopped between the resume state and these
        _save_checkpoints(output, state, run)
    for epoch in range(len(state.records) + 1, config.epochs + 1):
        started = time.perf_counter()
        with fitting_memory(
            config.batch_size, "lower batch_size (--batch-size), or train on more devices"
        ):
            losses = train_epoch(state, train, loss, config, epoch, seed, device)
        record = {"epoch": epoch, "learning_rate": state.optimizer.param_groups[0]["lr"]}
        record |= {f"train_{name}": value for name, value in losses.items()}
        record |= {f"val_{name}": value for name, value in validate(state.result).items()}
        record["seconds"] = round(time.perf_counter() - started, 1)
        state.records.append(record)
        if processes.rank() == 0:
            parts = {name: thing.state_dict() for name, thing in state.stateful.items()}
            write_state(
                output / RESUME,
                parts | {"records": state.records, "run": run},
                previous=output / PREVIOUS,
            )
            _save_checkpoints(output, state, run)
        label = description.get("settings", {}).get("label", description["model"])
        values = ", ".join(
            f"{name.replace('train_', '')} {record[name]:.4g}" for name in _TOLD if name in record
        )
        print(f"{label}, epoch {epoch}/{config.epochs}: {values}", flush=True)
    if processes.rank() == 0:
        _tidy(output)
    processes.barrier()  # whoever goes on finds what the first process wrote
    return pd.DataFrame(state.records)


def prepared(model: nn.Module, config: Training, classes: int, updates_per_epoch: int) -> _State:
    """Everything that the training of ``model`` needs, before its first epoch."""
    rate, warmup = config.learning_rate, round(config.warmup_epochs * updates_per_epoch)
    optimizer = create_optimizer_v2(
        model, opt=config.optimizer, lr=rate, weight_decay=config.weight_decay
    )
    schedule = CosineLRScheduler(
        optimizer,
        config.epochs * updates_per_epoch,
        warmup_t=warmup,
        warmup_lr_init=rate * 1e-3,
        t_in_epochs=False,
    )
    mix = None
    if config.mixup or config.cutmix:
        mix = Mixup(
            config.mixup, config.cutmix, label_smoothing=0.0, num_classes=classes
        )  # the loss smooths
    ema = ModelEmaV3(model, config.ema_decay) if config.ema_decay else None
    return _State(model, optimizer, ema, schedule, mix, records=[])


def train_epoch(
    state: _State,
    train: Images,
    loss: Loss,
    config: Training,
    epoch: int,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """One pass over the training images; returns the mean of the loss and of each of its parts."""
    epoch_seed = (
        seed * 10_007 + epoch
    )  # of everything random in this epoch: resuming needs no stored random state
    seed_everything(epoch_seed + 1_000_003 * processes.rank())
    batches = loader(
        train, config.batch_size, epoch_seed, share=(processes.rank(), processes.count())
    )
    half = config.precision == "bfloat16" and gains_by_bfloat16(device)
    model = state.model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums = defaultdict(float)
    bar = tqdm(
        batches, desc=f"epoch {epoch}/{config.epochs}", unit="batch", leave=False, disable=None
    )
    for step, (images, labels) in enumerate(bar):
        update = (epoch - 1) * len(batches) + step
        state.schedule.step_update(update)
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        if state.mix:
            images, labels = state.mix(images, labels)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            losses = loss(model, images, labels, update / (config.epochs * len(batches)))
        state.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        for parameter in parameters:
            if (
                parameter.grad is None
            ):  # no token came to its layer: packed execution leaves it out, masked gives zeros
                parameter.grad = torch.zeros_like(parameter)
        processes.average_gradients(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm).item()
        total = losses.total.item()
        for what, value in (("loss", total), ("gradient", norm)):
            if not math.isfinite(value):
                raise UserError(
                    f"the {what} became {value} in epoch {epoch}, batch {step + 1}; lower the learning "
                    f"rate and train into another folder, by --output (the checkpoints of the last "
                    f"finished epoch are kept)"
                )
        state.optimizer.step()
        if state.ema:
            state.ema.update(model)
        sums["loss"] += total
        for name, value in losses.parts.items():
            sums[name] += value.item()
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)
    means = processes.mean(torch.tensor(list(sums.values()), dtype=torch.float64) / len(batches))
    return dict(zip(sums, means.tolist(), strict=True))


def _check_shares(config: Training, images: int) -> None:
    """Raises UserError unless every process gets as many images of a batch as the others, two by
    two for Mixup.
    """
    batch_size, mixed = min(config.batch_size, images), bool(config.mixup or config.cutmix)
    unit = processes.count() * (2 if mixed else 1)
    if batch_size % unit:
        fitting = max(unit, batch_size - batch_size % unit)
        size = f"set batch_size (--batch-size) to {fitting}"
        remedy = size if fitting <= images else "add images"
        why = f"{processes.count()} processes share it{', and Mixup takes pairs' if mixed else ''}"
        what = f"a batch of {batch_size} images is no multiple of {unit}"
        raise UserError(f"{what} ({why}): {remedy}")


def finished_history(output: Path, run: dict, config: Training) -> pd.DataFrame | None:
    """The history of a run that lies finished in ``output``; raises UserError when another run lies
    there.
    """
    if not (output / "last.json").is_file():
        return None
    found = read_json(output / "last.json")
    if found.get("run") != run:
        raise UserError(
            f"{output} holds another run; name another folder, or delete it to start again"
        )
    if found["epoch"] != config.epochs or not (output / "last.safetensors").is_file():
        return None
    try:
        history = pd.read_csv(output / "history.csv")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{output / 'history.csv'} cannot be read ({error}); delete {output} to train again"
        ) from None
    if processes.rank() == 0:
        _tidy(output)
    return history


def _save_checkpoints(output: Path, state: _State, run: dict) -> None:
    """Write what follows from the last finished epoch: history, last and, if it is the best so far,
    best.
    """
    history, last = pd.DataFrame(state.records), state.records[-1]
    facts = {"run": run, "epoch": last["epoch"], "validation": last}
    best = last["val_accuracy"] >= history["val_accuracy"].max()
    write_atomically(output / "history.csv", history.to_csv(index=False).encode())
    for name in ("best", "last") if best else ("last",):
        save_checkpoint(
            output / f"{name}.safetensors", state.result, run["model"], run["arguments"], **facts
        )


def _resume(output: Path, state: _State, run: dict, device: torch.device) -> None:
    """Load what an interrupted run left in ``output``, if anything, into ``state``.

    A damaged file is named and the one before it taken; raises UserError when none is whole, or of
    another run.
    """
    found = [path for path in (output / RESUME, output / PREVIOUS) if path.is_file()]
    for path in found:
        try:
            parts = read_state(path, device)
        except UserError as error:
            print(error, flush=True)
            continue
        if parts["run"] != run:
            raise UserError(
                f"{output} holds another run; name another folder, or delete it to start again"
            )
        for name, thing in state.stateful.items():
            thing.load_state_dict(parts[name])
        state.records[:] = parts["records"]
        print(f"going on after epoch {len(state.records)} of the run in {output}", flush=True)
        return
    if found:
        names = " and ".join(str(path) for path in found)
        raise UserError(f"{names} cannot be read; delete {output} to start again")


def _tidy(output: Path) -> None:
    """Remove what only an unfinished run needs, and what an interruption left half written."""
    weights = ("last.safetensors", "last.json", "best.safetensors", "best.json")
    for name in (RESUME, PREVIOUS, *(f"{name}.tmp" for name in ("history.csv", RESUME, *weights))):
        (output / name).unlink(missing_ok=True)
