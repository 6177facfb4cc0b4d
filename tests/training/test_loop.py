"""The training loop: a run that stops at any moment ends as if it had not, and faults keep it."""

import hashlib
import os
import pickle
import re
import shutil

import pandas as pd
import pytest
import timm
import torch
from conftest import random_images, read_files, refused
from msgspec.structs import replace

from avit_lib.losses import AdaptiveLoss, TaskLoss
from avit_lib.training import Training, files, fit, load_checkpoint, seed_everything
from avit_lib.training.loop import RESUME

CONFIG = Training(epochs=3, learning_rate=2e-3, batch_size=16)  # of two batches an epoch
MIXED = replace(CONFIG, ema_decay=0.9, mixup=0.8, cutmix=1.0)
LOSS = AdaptiveLoss(task=TaskLoss(0.1))
DESCRIPTION = {"model": "avit_nano", "arguments": {}}
TRAIN, VALIDATION = random_images(32), random_images(40, seed=1)


class PowerCut(Exception):
    """What stops a run from outside."""


@torch.no_grad()
def validate(model):
    images, labels = VALIDATION[:]
    correct = model.eval()(images).argmax(dim=1) == labels
    return {"accuracy": correct.float().mean().item()}


def train(folder, loss=LOSS, config=CONFIG, data=TRAIN, seed=0, validate=validate, **arguments):
    """Train a fresh small model in ``folder``."""
    seed_everything(seed)
    arguments = {"drop_rate": 0.1, "beta": -3.0} | arguments
    model = timm.create_model("avit_nano", **arguments)
    return fit(model, data, loss, config, folder, validate, description=DESCRIPTION, seed=seed)


def watch(told, stop_at=None):
    """The loss, which notes what it is given, and is cut off at call ``stop_at``."""

    def compute(model, images, labels, progress):
        told.append((images, labels, progress, next(model.parameters()).detach().clone()))
        if len(told) == stop_at:
            raise PowerCut
        return LOSS(model, images, labels, progress)

    return compute


def content(folder):
    """What a run left, without the seconds."""
    seconds = rb'(?m)(,|"seconds": )[\d.]+$'  # in history.csv the last column
    return {path.name: re.sub(seconds, b"", path.read_bytes()) for path in folder.iterdir()}


def test_gradients_are_clipped(tmp_path):
    model = timm.create_model("avit_nano")
    config = replace(CONFIG, epochs=1, clip_norm=1e-3)
    fit(model, TRAIN, LOSS, config, tmp_path, validate, description=DESCRIPTION)
    gradients = [parameter.grad for parameter in model.parameters()]
    assert torch.nn.utils.get_total_norm(gradients) == pytest.approx(1e-3)


# ---- interruptions ----


@pytest.mark.parametrize("config", [CONFIG, MIXED])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, config):
    whole, pieces, told = tmp_path / "whole", tmp_path / "pieces", []
    train(whole, config=config)
    for calls in (4, 7):  # the second batch of epoch 2, the first of epoch 3
        with pytest.raises(PowerCut):
            train(pieces, watch(told, calls), config)
    history = train(pieces, watch(told), config)
    assert content(pieces) == content(whole)
    pd.testing.assert_frame_equal(train(pieces), history)  # nothing is trained
    assert [round(progress * 6) for _, _, progress, _ in told] == [0, 1, 2, 3, 2, 3, 4, 4, 5]
    classes = {labels.shape[1:] for _, labels, _, _ in told}
    assert classes == {(10,) if config.mixup else ()}  # Mixup gives the loss probabilities


def test_a_stop_at_any_write(tmp_path, monkeypatch):
    whole, moves, at = tmp_path / "whole", 0, 0
    options = {"config": MIXED, "validate": lambda model: {"accuracy": 0.5}}  # all are the best
    train(whole, **options)
    replace_file = os.replace

    def cut_off(source, target):
        nonlocal moves
        moves += 1
        if moves == at:
            raise PowerCut
        replace_file(source, target)

    monkeypatch.setattr(files.os, "replace", cut_off)
    for at in range(1, 100):
        moves, folder = 0, tmp_path / str(at)
        try:
            train(folder, **options)
        except PowerCut:
            train(folder, **options)
            assert content(folder) == content(whole)
        else:
            break
    assert at > 12  # three epochs, four files or more


@pytest.fixture
def unfinished(tmp_path):
    """The folder of a run that was cut off in its third epoch."""
    with pytest.raises(PowerCut):
        train(tmp_path / "run", watch([], stop_at=5))
    return tmp_path / "run"


def test_a_state_of_which_nobody_says_whose_it_is_is_left(unfinished, tmp_path):
    for path in unfinished.iterdir():
        if path.name != RESUME:
            path.unlink()
    other = replace(CONFIG, learning_rate=1e-2)
    train(unfinished, config=other)
    train(tmp_path / "new", config=other)
    assert content(unfinished) == content(tmp_path / "new")


def test_a_state_of_another_run_is_named(unfinished, tmp_path):
    with pytest.raises(PowerCut):
        train(tmp_path / "b", watch([], stop_at=5), seed=1)
    shutil.copy(tmp_path / "b" / RESUME, unfinished)
    with refused(f"{RESUME} is of another run; delete it"):
        train(unfinished)


def test_a_damaged_state_is_named_and_nothing_overwritten(unfinished):
    path = unfinished / RESUME
    path.write_bytes(path.read_bytes()[:-40] + 40 * b"\0")
    before = read_files(unfinished)
    with refused(f"{path} is damaged; delete"):
        train(unfinished)
    assert read_files(unfinished) == before


def test_a_state_that_would_run_code_is_not_run(unfinished, tmp_path):
    content = f"cos\nmkdir\n(V{tmp_path / 'exploded'}\ntR.".encode()
    (unfinished / RESUME).write_bytes(content + hashlib.sha256(content).digest())
    with pytest.raises(pickle.UnpicklingError):
        train(unfinished)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors"])
def test_a_finished_run_with_damaged_weights_is_trained_again(tmp_path, name, capsys):
    train(tmp_path)
    assert "starts again" not in capsys.readouterr().out
    whole, path = content(tmp_path), tmp_path / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    train(tmp_path)
    assert "are missing or changed: it starts again" in capsys.readouterr().out
    assert content(tmp_path) == whole


def test_a_best_checkpoint_of_another_run_is_not_kept(tmp_path):
    train(tmp_path / "own")
    whole = content(tmp_path / "own")
    train(tmp_path / "other", seed=1)
    for path in (tmp_path / "other").glob("best.*"):
        shutil.copy(path, tmp_path / "own")
    train(tmp_path / "own")
    assert content(tmp_path / "own") == whole


def test_two_trainings_do_not_share_a_folder(tmp_path):
    def intrude(*batch):
        with refused("another process trains into"):
            train(tmp_path)
        intruded.append(batch)
        return LOSS(*batch)

    intruded = []
    train(tmp_path, intrude)
    assert intruded


@pytest.mark.parametrize("lines", [0, 1, 2])
def test_a_finished_run_with_half_a_history_is_trained_again(tmp_path, lines):
    train(tmp_path)
    whole, path = content(tmp_path), tmp_path / "history.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    train(tmp_path)
    assert content(tmp_path) == whole


@pytest.mark.parametrize("name", ["best.safetensors", "last.safetensors", "history.csv"])
def test_a_file_of_somebody_else_is_not_overwritten(tmp_path, name):
    (tmp_path / name).write_bytes(b"foreign")
    with refused("holds another run, of other settings or images; name another folder"):
        train(tmp_path)
    assert read_files(tmp_path) == {tmp_path / name: b"foreign"}


def test_a_link_is_written_through_and_a_device_refused(tmp_path):
    link, target = tmp_path / "link.txt", tmp_path / "elsewhere" / "file.txt"
    link.symlink_to(target)
    for content in (b"old", b"new"):
        files.write_atomically(link, content)
        assert link.is_symlink() and target.read_bytes() == content
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with refused(f"{pipe} is no file that can be replaced"):
        files.write_atomically(pipe, b"new")
    assert pipe.is_fifo()


# ---- what is trained ----


def test_history_and_checkpoints(tmp_path):
    config = Training(epochs=8, learning_rate=5e-3, batch_size=16, warmup_epochs=0)
    history = train(tmp_path, config=config, data=random_images(64))
    for falls in ("learning_rate", "train_task"):
        assert history[falls].iloc[-1] < history[falls].iloc[0] - 1e-3
    accuracy = history["val_accuracy"]
    assert accuracy.max() > 0.2  # chance is 0.1
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "history.csv"), history)
    for name, expected in (("last", accuracy.iloc[-1]), ("best", accuracy.max())):
        model, facts = load_checkpoint(tmp_path / f"{name}.safetensors")
        assert validate(model)["accuracy"] == expected == facts["validation"]["val_accuracy"]


def test_every_epoch_sees_all_images_in_an_order_of_its_own_and_of_the_seed(tmp_path):
    told = []
    for seed in (0, 1):
        train(tmp_path / str(seed), watch(told), seed=seed)
    shown = [images.mean(dim=(1, 2, 3)) for images, *_ in told]  # tells them apart
    orders = torch.cat(shown).reshape(6, len(TRAIN))
    assert (orders.sort().values == orders[0].sort().values).all()
    assert len(orders.unique(dim=0)) == 6


def test_the_averaged_weights_are_those_evaluated_and_kept(tmp_path):
    told, evaluated = [], []

    def look(model):
        evaluated.append(next(model.parameters()).detach().clone())
        return {"accuracy": 0.0}

    train(tmp_path, watch(told), replace(CONFIG, ema_decay=0.75), validate=look)
    average = told[0][3]
    for *_, weights in told[1:3]:  # after each of the two updates of the first epoch
        average = 0.75 * average + 0.25 * weights
    torch.testing.assert_close(evaluated[0], average)
    kept, _ = load_checkpoint(tmp_path / "last.safetensors")
    assert torch.equal(next(kept.parameters()), evaluated[-1])


def test_mixup_of_an_odd_batch_is_refused(tmp_path):
    with refused("a multiple of 2, at most the 32 training images"):
        train(tmp_path, config=replace(MIXED, batch_size=15))


def test_layers_that_no_token_reaches_are_trained_alike_by_both_executions(tmp_path):
    # All tokens halt in layer 2: the others get no gradient when packed, and zeros when masked.
    loss = AdaptiveLoss(alpha_distr=0.0, task=TaskLoss(0.1))
    weights = []
    for execution in ("masked", "packed"):
        folder = tmp_path / execution
        config = replace(CONFIG, weight_decay=0.5)
        history = train(folder, loss, config, gamma=0.0, beta=0.5, execution=execution)
        assert history["train_depth"].eq(2).all()
        weights.append(load_checkpoint(folder / "last.safetensors")[0].state_dict())
    for name, masked in weights[0].items():
        torch.testing.assert_close(weights[1][name], masked, msg=name)
