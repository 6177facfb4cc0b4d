"""The training loop: resuming is exact, faults keep what was reached."""

from copy import deepcopy

import pandas as pd
import pytest
import timm
import torch
from conftest import random_images, small_model
from msgspec.structs import replace
from safetensors.torch import load_file

from avit_lib.errors import UserError
from avit_lib.evaluation import metrics, predict
from avit_lib.losses import AdaptiveLoss, Losses, TaskLoss
from avit_lib.training import (
    Training,
    fit,
    load_checkpoint,
    pick_device,
    read_json,
    seed_everything,
)

CONFIG = Training(epochs=3, learning_rate=2e-3, batch_size=16)
PLAIN, ADAPTIVE = "deit_nano", "avit_nano"
LOSSES = {PLAIN: TaskLoss(0.1), ADAPTIVE: AdaptiveLoss(task=TaskLoss(0.1))}
TRAIN, VALIDATION = random_images(64), random_images(40, seed=1)


class PowerCut(Exception):
    """What stops a run from outside."""


def stopping(loss, after, stop):
    """``loss``, whose call number ``after`` + 1 is answered by ``stop(losses)`` instead."""
    calls = 0

    def stopped(model, images, labels, progress):
        nonlocal calls
        calls += 1
        losses = loss(model, images, labels, progress)
        return stop(losses) if calls > after else losses

    return stopped


def power_cut(losses):
    raise PowerCut


def not_a_number(losses):
    return Losses(losses.total * float("nan"), losses.parts)


def validate(model):
    return metrics(model, predict(model, VALIDATION))


def train(
    folder, name=PLAIN, loss=None, config=CONFIG, seed=0, validate=validate, data=TRAIN, **changes
):
    """Train a fresh small model in ``folder``."""
    seed_everything(seed)
    model = timm.create_model(name, drop_rate=0.1, **({"beta": -3.0} if name == ADAPTIVE else {}))
    model.execution = config.execution
    description = {"model": name, "arguments": {}} | changes
    return fit(
        model,
        data,
        loss or LOSSES[name],
        config,
        folder,
        validate,
        description=description,
        seed=seed,
    )


@pytest.mark.parametrize(
    "changes", [{}, {"ema_decay": 0.9, "mixup": 0.8, "cutmix": 1.0}], ids=["plain", "mixed"]
)
@pytest.mark.parametrize("name", [PLAIN, ADAPTIVE])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, name, changes):
    whole, pieces, config = tmp_path / "whole", tmp_path / "pieces", replace(CONFIG, **changes)
    expected = train(whole, name, config=config)
    with pytest.raises(PowerCut):  # four updates an epoch: in the middle of epoch 2
        train(pieces, name, loss=stopping(LOSSES[name], 6, power_cut), config=config)
    assert read_json(pieces / "last.json")["epoch"] == 1
    with pytest.raises(PowerCut):  # and again, in epoch 3
        train(pieces, name, loss=stopping(LOSSES[name], 5, power_cut), config=config)
    found = train(pieces, name, config=config)
    for file in ("last.safetensors", "best.safetensors"):
        assert (pieces / file).read_bytes() == (whole / file).read_bytes()
    pd.testing.assert_frame_equal(
        found.drop(columns="seconds"), expected.drop(columns="seconds"), check_exact=True
    )
    assert found["epoch"].tolist() == [1, 2, 3]
    assert sorted(p.name for p in pieces.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_the_same_seed_gives_the_same_weights_another_seed_others(tmp_path):
    config = Training(epochs=1, learning_rate=2e-3, batch_size=16)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / name, config=config, seed=seed)
    a, b, c = ((tmp_path / name / "last.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_history_and_checkpoints(tmp_path):
    history = train(tmp_path, ADAPTIVE)
    assert {
        "train_loss",
        "train_task",
        "train_ponder",
        "train_distr",
        "val_accuracy",
        "val_mean_depth",
    } <= set(history)
    assert history["learning_rate"].iloc[-1] < history["learning_rate"].iloc[0]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "history.csv"), history)
    model, facts = load_checkpoint(tmp_path / "last.safetensors")
    assert facts["epoch"] == 3 and facts["run"]["seed"] == 0
    assert validate(model)["accuracy"] == pytest.approx(history["val_accuracy"].iloc[-1])
    best = read_json(tmp_path / "best.json")
    assert best["validation"]["val_accuracy"] == history["val_accuracy"].max()
    assert not list(tmp_path.glob("*.tmp"))


def test_every_epoch_sees_all_images_in_an_order_of_its_own(tmp_path):
    seen = []

    def watching(model, images, labels, progress):
        seen.append(images.mean(dim=(1, 2, 3)))  # tells the images apart
        return LOSSES[PLAIN](model, images, labels, progress)

    train(tmp_path, loss=watching)
    epochs = torch.cat(seen).reshape(3, len(TRAIN))
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_the_loss_is_told_the_progress_also_after_an_interruption(tmp_path):
    told = []

    def listening(model, images, labels, progress):
        told.append(progress)
        return LOSSES[PLAIN](model, images, labels, progress)

    with pytest.raises(PowerCut):  # four updates an epoch: in the middle of epoch 2
        train(tmp_path, loss=stopping(listening, 5, power_cut))
    train(tmp_path, loss=listening)
    expected = [update / 12 for update in range(12)]
    assert told == pytest.approx([*expected[:6], *expected[4:]])


def test_training_lowers_the_loss(tmp_path):
    history = train(
        tmp_path, config=Training(epochs=8, learning_rate=5e-3, batch_size=16, warmup_epochs=0)
    )
    assert history["train_loss"].iloc[-1] < history["train_loss"].iloc[0] - 0.1
    assert history["val_accuracy"].iloc[-1] > 0.2  # chance is 0.1


def test_a_loss_that_is_not_finite_keeps_the_last_finished_epoch(tmp_path):
    reference = tmp_path / "reference"
    with pytest.raises(PowerCut):
        train(reference, loss=stopping(LOSSES[PLAIN], 4, power_cut))
    folder = tmp_path / "folder"
    with pytest.raises(UserError, match="nan in epoch 2, batch 2") as error:
        train(folder, loss=stopping(LOSSES[PLAIN], 5, not_a_number))
    assert "\n" not in str(error.value)
    assert (folder / "last.safetensors").read_bytes() == (
        reference / "last.safetensors"
    ).read_bytes()
    assert load_checkpoint(folder / "last.safetensors")[1]["epoch"] == 1


def test_a_finished_run_returns_its_history_without_training(tmp_path):
    history = train(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = train(tmp_path, loss=stopping(LOSSES[PLAIN], 0, power_cut))
    pd.testing.assert_frame_equal(again, history)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("changes", [{"seed": 1}, {"settings": "others"}])
def test_the_folder_of_another_run_is_refused(tmp_path, finished, changes):
    if finished:
        train(tmp_path, config=Training(epochs=1, learning_rate=2e-3, batch_size=16))
    else:
        with pytest.raises(PowerCut):
            train(tmp_path, loss=stopping(LOSSES[PLAIN], 4, power_cut))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="another run") as error:
        train(tmp_path, **changes)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("blocked", ["history.csv", "last.safetensors", "last.json"])
def test_a_stop_while_the_last_epoch_is_being_saved(tmp_path, blocked):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    expected = train(whole)
    obstacle = pieces / f"{blocked}.tmp"

    def blocking(model):
        if (pieces / "last.json").is_file() and read_json(pieces / "last.json")["epoch"] == 2:
            obstacle.mkdir()  # the file cannot be written in epoch 3
        return validate(model)

    with pytest.raises(UserError, match="cannot be written"):
        train(pieces, validate=blocking)
    obstacle.rmdir()
    found = train(pieces)
    for file in ("last.safetensors", "best.safetensors"):
        assert (pieces / file).read_bytes() == (whole / file).read_bytes()
    assert load_checkpoint(pieces / "last.safetensors")[1]["epoch"] == 3
    pd.testing.assert_frame_equal(found.drop(columns="seconds"), expected.drop(columns="seconds"))
    pd.testing.assert_frame_equal(pd.read_csv(pieces / "history.csv"), found)


def test_the_averaged_weights_are_those_evaluated_and_kept(tmp_path):
    trained, evaluated = [], []

    def watching(model):
        evaluated.append(next(model.parameters()).detach().clone())
        return {"accuracy": 0.0}

    def loss(model, images, labels, progress):
        trained.append(next(model.parameters()).detach().clone())  # before the update
        return LOSSES[PLAIN](model, images, labels, progress)

    train(tmp_path, loss=loss, config=replace(CONFIG, ema_decay=0.75), validate=watching)
    average = trained[0]
    for weights in trained[1:5]:  # after each of the four updates of the first epoch
        average = 0.75 * average + 0.25 * weights
    torch.testing.assert_close(evaluated[0], average)
    kept, _ = load_checkpoint(tmp_path / "last.safetensors")
    assert torch.equal(next(kept.parameters()), evaluated[-1])


@pytest.mark.parametrize("name", [PLAIN, ADAPTIVE])
def test_mixup_gives_the_loss_probabilities(tmp_path, name):
    seen = []

    def watching(model, images, labels, progress):
        seen.append(labels)
        return LOSSES[name](model, images, labels, progress)

    history = train(tmp_path, name, loss=watching, config=replace(CONFIG, mixup=0.8))
    labels = torch.cat(seen)
    assert labels.shape == (3 * len(TRAIN), 10)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(len(labels)))
    assert ((labels > 0.01) & (labels < 0.99)).any()
    assert history["train_loss"].notna().all()


@pytest.mark.parametrize(
    ("batch_size", "images", "fitting"), [(15, 16, 14), (64, 13, 12), (1, 16, 2)]
)
def test_mixup_of_an_odd_batch_is_refused_with_a_size_that_works(
    batch_size, images, fitting, tmp_path
):
    config, data = (
        replace(CONFIG, batch_size=batch_size, mixup=0.8),
        TRAIN.select(torch.arange(images)),
    )
    with pytest.raises(
        UserError, match=rf"Mixup takes pairs\): set batch_size \(--batch-size\) to {fitting}$"
    ):
        train(tmp_path, config=config, data=data)
    assert (
        len(train(tmp_path, config=replace(config, batch_size=fitting, epochs=1), data=data)) == 1
    )


def test_layers_that_no_token_reaches_are_trained_alike_by_both_executions(tmp_path, monkeypatch):
    # All tokens halt in the second layer: the others get no gradient when packed, and zeros when
    # masked.
    loss = AdaptiveLoss(alpha_distr=0.0, task=TaskLoss(0.1))
    halting = small_model("avit", gamma=0.0, beta=0.5)
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: deepcopy(halting))
    weights = []
    for execution in ("masked", "packed"):
        config = replace(CONFIG, execution=execution, weight_decay=0.5)
        history = train(tmp_path / execution, ADAPTIVE, loss=loss, config=config)
        assert history["train_depth"].eq(2).all()
        weights.append(load_file(tmp_path / execution / "last.safetensors"))
    for name, masked in weights[0].items():
        torch.testing.assert_close(weights[1][name], masked, msg=name)


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="tpu"):
        pick_device("tpu")
