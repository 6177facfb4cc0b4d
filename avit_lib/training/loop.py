"""One training loop for every model; it knows of halting only what its loss function returns."""

import math
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
from msgspec import Meta, Struct
from timm.data import Mixup
from timm.models.vision_transformer import Attention
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from tqdm.auto import tqdm

from avit_lib.data import Images, loader
from avit_lib.errors import UserError, fitting_memory
from avit_lib.losses import Losses
from avit_lib.places import digest_file
from avit_lib.training import processes
from avit_lib.training.checkpoints import save_checkpoint
from avit_lib.training.files import (
    only_one,
    read_json,
    read_state,
    write_atomically,
    write_state,
)

RESUME = "resume.pt"  # the state after the last finished epoch
# Of what is written after each epoch, best.json is the first and last.safetensors the last.
WRITTEN = ("last.json", "best.json", "best.safetensors", "last.safetensors", "history.csv")

# Of model, images, labels and progress 0..1.
Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor, float], Losses]

Positive = Annotated[float, Meta(gt=0, le=1e6)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
NotNegative = Annotated[float, Meta(ge=0, le=1e6)]
Count = Annotated[int, Meta(ge=1, lt=2**31)]


class Training(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model is trained: the section ``training`` of a profile.

    The optimizer is AdamW; its learning rate warms up linearly, then follows a cosine to zero.
    """

    epochs: Count
    learning_rate: Positive
    batch_size: Count = 64  # of all processes together
    weight_decay: NotNegative = 0.05
    warmup_epochs: NotNegative = 0.5
    label_smoothing: Fraction = 0.1
    clip_norm: Positive = 1.0
    # "bfloat16": autocast, where the device gains by it
    precision: Literal["float32", "bfloat16"] = "float32"
    # of the averaged weights, which are then those evaluated and kept; 0: none
    ema_decay: Fraction = 0.0
    mixup: NotNegative = 0.0  # alpha of Mixup; 0: none
    cutmix: NotNegative = 0.0  # alpha of CutMix; 0: none; with both, each batch takes one of them


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def pick_device(name: str = "auto") -> torch.device:
    """The device "cpu", "gpu" or "auto" (a GPU if there is one); raises UserError without it."""
    there = torch.cuda.is_available()
    if name == "gpu" and not there:
        raise UserError("no CUDA GPU is visible; use --device cpu or auto")
    kinds = {"cpu": "cpu", "gpu": "cuda", "auto": "cuda" if there else "cpu"}
    return torch.device(kinds[name])


def uses_bfloat16(config: Training, device: torch.device) -> bool:
    """Whether a training runs in bfloat16: on a CPU only if that multiplies in it."""
    if device.type == "cuda":
        gains = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        gains = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return gains and config.precision == "bfloat16"


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
    Raises UserError when another description lies in ``output``, when nothing can be written there
    or another process trains there, when memory does not suffice and when the loss is no longer
    finite: then the checkpoints of the last finished epoch stay.
    """
    run = description | {"seed": seed}
    history = finished_history(output, run, config)
    if history is not None:
        return history
    _check_trainable(train, config)
    output.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=output).close()  # fails now rather than after the first epoch
    job = _prepare(model, train, loss, config, torch.device(device), adjust)
    with only_one(output) if processes.rank() == 0 else nullcontext():
        finished_history(output, run, config)  # another process may have ended another run
        records = _train(job, train, output, run, validate)
    return pd.DataFrame(records)


@dataclass(frozen=True)
class _Job:
    """What a training works with, from its first step to its last."""

    model: nn.Module
    loss: Loss
    config: Training
    device: torch.device
    optimizer: torch.optim.Optimizer
    schedule: CosineLRScheduler
    average: ModelEmaV3 | None
    updates: int  # of an epoch
    half: bool  # whether it runs in bfloat16

    @property
    def result(self) -> nn.Module:
        """The model that is evaluated and kept."""
        return self.average.module if self.average else self.model

    @property
    def changing(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """What a resumed training needs as it was."""
        return {"model": self.model, "optimizer": self.optimizer, "result": self.result}


def _prepare(
    model: nn.Module,
    train: Images,
    loss: Loss,
    config: Training,
    device: torch.device,
    adjust: Callable[[torch.optim.Optimizer], None] | None,
) -> _Job:
    """Optimizer, schedule and averaged weights of a training.

    ``model`` goes to ``device``; in bfloat16 on CPUs its attention is the plain formula.
    """
    model.to(device)
    optimizer = create_optimizer_v2(
        model, "adamw", lr=config.learning_rate, weight_decay=config.weight_decay
    )
    if adjust:
        adjust(optimizer)
    updates = count_updates(train, config)
    schedule = CosineLRScheduler(
        optimizer,
        config.epochs * updates,
        warmup_t=round(config.warmup_epochs * updates),
        warmup_lr_init=config.learning_rate * 1e-3,
        t_in_epochs=False,
    )
    average = ModelEmaV3(model, config.ema_decay) if config.ema_decay else None
    half = uses_bfloat16(config, device)
    if half and device.type == "cpu":
        for part in model.modules():
            if isinstance(part, Attention):
                part.fused_attn = False  # backward, the fused kernel takes three times as long
    return _Job(model, loss, config, device, optimizer, schedule, average, updates, half)


def _train(
    job: _Job,
    train: Images,
    output: Path,
    run: dict,
    validate: Callable[[nn.Module], dict[str, float]],
) -> list[dict]:
    """The epochs that are left of a run in ``output``; its records, one an epoch."""
    config, seed = job.config, run["seed"]
    records = _resume(job, output, run)
    processes.share(job.model)
    processes.barrier()  # until here all processes only read
    if processes.rank() == 0:
        _tell_unusual(job, len(train))
    for epoch in range(len(records) + 1, config.epochs + 1):
        started = time.perf_counter()
        record = {"epoch": epoch} | _train_epoch(job, train, epoch, seed)
        records.append(record)
        if processes.rank() == 0:  # alone: validation images are few
            record |= {f"val_{name}": value for name, value in validate(job.result).items()}
            record["seconds"] = round(time.perf_counter() - started, 1)
            _write_results(output, run, job.result, records)
            if epoch < config.epochs:
                state = {name: part.state_dict() for name, part in job.changing.items()}
                write_state(output / RESUME, state | {"records": records, "run": run})
            told = f"loss {record['train_loss']:.4g}, accuracy {record['val_accuracy']:.4g}"
            print(f"{output.name}, epoch {epoch}/{config.epochs}: {told}", flush=True)
    if processes.rank() == 0:
        (output / RESUME).unlink(missing_ok=True)
    processes.barrier()  # whoever goes on finds what the first process wrote
    return records


def _resume(job: _Job, output: Path, run: dict) -> list[dict]:
    """Take up the run in ``output``, if one was interrupted there; its records, one an epoch."""
    if not (output / "last.json").is_file():  # which says whose it is
        return []
    if not (output / RESUME).is_file():
        print(f"files of the run in {output} are missing or changed: it starts again", flush=True)
        return []
    state = read_state(output / RESUME, job.device)
    if state.get("run", run) != run:
        raise UserError(f"{output / RESUME} is of another run; delete it to start again")
    for name, part in job.changing.items():
        part.load_state_dict(state[name])
    records = state["records"]
    print(f"going on after epoch {len(records)} of the run in {output}", flush=True)
    return records


def _tell_unusual(job: _Job, images: int) -> None:
    """Say where averaged weights hardly move, and how many training ``images`` are left out."""
    config = job.config
    old = config.ema_decay ** (config.epochs * job.updates)
    if old > 0.1:
        print(
            f"{old:.0%} of the averaged weights will still be those of the start: lower ema_decay "
            f"for so few steps",
            flush=True,
        )
    left = images - job.updates * config.batch_size
    if left > 0:
        print(
            f"each epoch leaves out {left} of {images} training images, drawn anew: they fill "
            f"no batch of {config.batch_size}",
            flush=True,
        )


def _train_epoch(job: _Job, train: Images, epoch: int, seed: int) -> dict[str, float]:
    """One pass over the training images; the means of what was lost, and the learning rate."""
    config, rank = job.config, processes.rank()
    # Of everything random in this epoch, so that resuming needs no stored random state.
    epoch_seed = seed * 10_007 + epoch
    seed_everything(epoch_seed + 1_000_003 * rank)
    batches = loader(train, config.batch_size, epoch_seed, share=(rank, processes.count()))
    # The loss smooths; what alpha is 0 is left out.
    mix = Mixup(config.mixup, config.cutmix, label_smoothing=0.0, num_classes=len(train.classes))
    job.model.train()
    lost = []
    bar = tqdm(batches, f"epoch {epoch}/{config.epochs}", leave=False, disable=None)
    for step, (images, labels) in enumerate(bar):
        images, labels = images.to(job.device), labels.to(job.device)
        if config.mixup or config.cutmix:
            images, labels = mix(images, labels)
        losses, norm = _train_batch(job, images, labels, (epoch - 1) * job.updates + step)
        if not math.isfinite(losses["loss"] + norm):
            raise UserError(
                f"loss {losses['loss']:g}, gradient {norm:g} in epoch {epoch}, batch {step + 1}; "
                f"lower the learning rate and train into another folder, by --output (the "
                f"checkpoints of the last finished epoch are kept)"
            )
        job.optimizer.step()
        if job.average:
            job.average.update(job.model)
        lost.append(losses)
    record = {"learning_rate": job.optimizer.param_groups[0]["lr"]}
    for name, value in pd.DataFrame(lost).mean().items():
        own = torch.tensor(value, dtype=torch.float64)
        record[f"train_{name}"] = processes.mean(own).item()
    return record


def _train_batch(
    job: _Job, images: torch.Tensor, labels: torch.Tensor, update: int
) -> tuple[dict[str, float], float]:
    """The losses of a batch, and the norm of their gradients, which are left for the optimizer."""
    config = job.config
    job.schedule.step_update(update)
    parameters = list(job.model.parameters())
    for parameter in parameters:
        # Not None: packed execution leaves out a layer to which no token comes.
        parameter.grad = torch.zeros_like(parameter)
    with fitting_memory(
        config.batch_size, "lower batch_size (--batch-size), or train on more devices"
    ):
        with torch.autocast(job.device.type, torch.bfloat16, enabled=job.half):
            losses = job.loss(job.model, images, labels, update / (config.epochs * job.updates))
        losses.total.backward()
    processes.average_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm).item()
    parts = {name: part.item() for name, part in losses.parts.items()}
    return {"loss": losses.total.item()} | parts, norm


def count_updates(train: Images, config: Training) -> int:
    """How many steps an epoch takes."""
    return len(loader(train, config.batch_size, shuffle_seed=0))


def _check_trainable(train: Images, config: Training) -> None:
    """Raise UserError for images or batches that nothing can be learned from."""
    if len(train.classes) < 2:
        raise UserError(
            f"all training images are of class {train.classes[0]!r}: add a folder of another class"
        )
    unit = processes.count() * (2 if config.mixup or config.cutmix else 1)
    if min(config.batch_size, len(train)) % unit:
        raise UserError(
            f"set batch_size (--batch-size) to a multiple of {unit}, at most the {len(train)} "
            f"training images: processes share a batch, and Mixup takes pairs"
        )


def finished_history(output: Path, run: dict, config: Training) -> pd.DataFrame | None:
    """The history of a run that lies finished in ``output``; UserError when another lies there."""
    there = [name for name in WRITTEN if (output / name).exists()]
    described = [name for name in there if name.endswith(".json")]
    found = read_json(output / described[0]) if described else {}
    if there and found.get("run") != run:
        raise UserError(
            f"{output} holds another run, of other settings or images; name another folder, or "
            f"delete it to start again"
        )
    if not {*WRITTEN} <= {*there} or found["epoch"] != config.epochs:
        return None
    for weights in (output / "best.safetensors", output / "last.safetensors"):
        beside = read_json(weights.with_suffix(".json"))
        if beside.get("run") != run or digest_file(weights) != beside["sha256"]:
            return None
    try:
        history = pd.read_csv(output / "history.csv")
    except ValueError:  # no table
        return None
    whole = list(history.get("epoch", [])) == list(range(1, config.epochs + 1))
    return history if whole else None


def _write_results(output: Path, run: dict, model: nn.Module, records: list[dict]) -> None:
    """Write history.csv and the last checkpoint, which is the best as well if none was better."""
    history, last = pd.DataFrame(records), records[-1]
    facts = {"run": run, "epoch": last["epoch"], "validation": last}
    kind = run["model"], run["arguments"]
    if last["val_accuracy"] >= history["val_accuracy"].max():
        save_checkpoint(output / "best.safetensors", model, *kind, **facts)
    write_atomically(output / "history.csv", history.to_csv(index=False).encode())
    save_checkpoint(output / "last.safetensors", model, *kind, **facts)
