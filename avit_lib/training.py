"""One training loop for every model; it knows of halting only what its loss function returns."""

import io
import math
import pickle
import random
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from tqdm.auto import tqdm

from avit_lib.checkpoints import RESUME, read_json, save_checkpoint, write_atomically
from avit_lib.config import StudyError, Training
from avit_lib.data import ImageTensors, loader
from avit_lib.losses import Losses

Loss = Callable[[nn.Module, torch.Tensor, torch.Tensor, float], Losses]  # model, images, labels, progress 0..1


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of everything random in one epoch: resuming needs no stored random state."""
    return seed * 10_007 + epoch


def pick_device(name: str = "auto") -> torch.device:
    """The device called "cpu", "gpu" or "auto" (a GPU if there is one); raises StudyError when it is not there."""
    if name not in ("cpu", "gpu", "auto"):
        raise StudyError(f"unknown device {name!r}; choose from cpu, gpu, auto")
    if name == "gpu" and not torch.cuda.is_available():
        raise StudyError("no CUDA GPU is visible; use --device cpu or auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where ``precision`` asks for it and the device computes it natively, else a no-op."""
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16" and native)


def fit(
    model: nn.Module,
    train: ImageTensors,
    loss: Loss,
    config: Training,
    output: Path,
    validate: Callable[[nn.Module], dict[str, float]],
    *,
    description: dict,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> pd.DataFrame:
    """Train ``model`` and return its history, one row an epoch.

    ``validate`` returns the metrics of a model, among them "accuracy". Into ``output`` go last and best.safetensors
    (best by validation accuracy), history.csv and the resume state; with the same ``output``, an interrupted run goes
    on after its last finished epoch and a finished one returns at once. ``description`` (model, arguments, ...) goes
    into the JSON of each checkpoint; a folder whose description differs is refused. Raises StudyError on that, and
    when the loss is no longer finite: then the checkpoints of the last finished epoch stay.
    """
    device = torch.device(device)
    output = Path(output)
    history = _finished_history(output, description, config, seed)
    if history is not None:
        return history
    output.mkdir(parents=True, exist_ok=True)
    model.to(device)
    updates_per_epoch = len(loader(train, config.batch_size, shuffle_seed=0))
    optimizer = create_optimizer_v2(
        model, opt=config.optimizer, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=config.epochs * updates_per_epoch,
        warmup_t=round(config.warmup_epochs * updates_per_epoch),
        warmup_lr_init=config.learning_rate * 1e-3,
        t_in_epochs=False,
    )
    records = _resume(output, model, optimizer, description, seed, device)
    if records:  # the machine may have stopped between the resume state and these
        _save_checkpoints(output, model, records, description, seed)
    for epoch in range(len(records) + 1, config.epochs + 1):
        started = time.perf_counter()
        seed_everything(epoch_seed(seed, epoch))
        batches = loader(train, config.batch_size, shuffle_seed=epoch_seed(seed, epoch))
        first_update = (epoch - 1) * updates_per_epoch
        parts = _train_epoch(model, batches, loss, optimizer, scheduler, first_update, config, device, epoch)
        record = {"epoch": epoch, "learning_rate": optimizer.param_groups[0]["lr"]}
        record |= {f"train_{name}": value for name, value in parts.items()}
        record |= {f"val_{name}": value for name, value in validate(model).items()}
        record["seconds"] = round(time.perf_counter() - started, 1)
        records.append(record)
        _save_resume_state(output, model, optimizer, records, description, seed)
        _save_checkpoints(output, model, records, description, seed)
        values = ", ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "epoch")
        print(f"epoch {epoch}/{config.epochs}: {values}", flush=True)
    (output / RESUME).unlink(missing_ok=True)
    return pd.DataFrame(records)


def _train_epoch(model, batches, loss, optimizer, scheduler, first_update, config, device, epoch) -> dict[str, float]:
    """One pass over the training images; returns the mean of the loss and of each of its parts."""
    model.train()
    sums = defaultdict(float)
    bar = tqdm(batches, desc=f"epoch {epoch}/{config.epochs}", unit="batch", leave=False, disable=None)
    for step, (images, labels) in enumerate(bar):
        scheduler.step_update(first_update + step)
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast(config.precision, device):
            losses = loss(model, images, labels, (first_update + step) / (config.epochs * len(batches)))
        total = losses.total.item()
        if not math.isfinite(total):
            raise StudyError(
                f"the loss became {total} in epoch {epoch}, batch {step + 1}; lower the learning rate and run again "
                f"(the checkpoints of the last finished epoch are kept)"
            )
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        sums["loss"] += total
        for name, value in losses.parts.items():
            sums[name] += value.item()
        bar.set_postfix(loss=f"{total:.3f}", refresh=False)
    return {name: value / len(batches) for name, value in sums.items()}


def _finished_history(output: Path, description: dict, config: Training, seed: int) -> pd.DataFrame | None:
    """The history of a run that lies finished in ``output``; raises StudyError when another run lies there."""
    if not (output / "last.json").is_file():
        return None
    found = read_json(output / "last.json")
    if found.get("run") != description | {"seed": seed}:
        raise StudyError(f"{output} holds another run; name another folder, or delete it to start again")
    return pd.read_csv(output / "history.csv") if found["epoch"] == config.epochs else None


def _save_resume_state(output, model, optimizer, records, description, seed) -> None:
    run = description | {"seed": seed}
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "records": records, "run": run}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(output / RESUME, buffer.getvalue())


def _save_checkpoints(output, model, records, description, seed) -> None:
    """Write what follows from the last finished epoch: history, last and, if it is the best so far, best."""
    facts = {"run": description | {"seed": seed}, "epoch": records[-1]["epoch"], "validation": records[-1]}
    best = records[-1]["val_accuracy"] >= max(record["val_accuracy"] for record in records)
    write_atomically(output / "history.csv", pd.DataFrame(records).to_csv(index=False).encode())
    for name in ("best", "last") if best else ("last",):
        save_checkpoint(output / f"{name}.safetensors", model, description["model"], description["arguments"], **facts)


def _resume(output, model, optimizer, description, seed, device) -> list[dict]:
    """Load the resume state of ``output`` into model and optimizer; returns the records of the finished epochs."""
    path = output / RESUME
    if not path.is_file():
        return []
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise StudyError(f"{path} is damaged ({reason}); delete it to start this run again") from None
    if state["run"] != description | {"seed": seed}:
        raise StudyError(f"{output} holds another run; name another folder, or delete it to start again")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"going on after epoch {len(state['records'])} of the run in {output}", flush=True)
    return state["records"]
