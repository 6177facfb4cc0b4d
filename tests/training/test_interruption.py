"""Nothing is lost: a training that stops at any moment, or whose state is damaged, ends as if it
had not been.
"""

import hashlib
import os
import pickle
from pathlib import Path

import pandas as pd
import pytest
import timm
from conftest import assert_same, at_batch, finished_epochs, random_images

from avit_lib.errors import UserError
from avit_lib.evaluation import metrics, predict
from avit_lib.losses import TaskLoss
from avit_lib.training import Training, files, fit, seed_everything
from avit_lib.training.loop import PREVIOUS, RESUME

CONFIG = Training(epochs=3, learning_rate=2e-3, batch_size=16, ema_decay=0.9, mixup=0.8)
TRAIN, VALIDATION = random_images(32), random_images(20, seed=1)


class PowerCut(Exception):
    """What stops a run from outside."""


def train(folder: Path) -> pd.DataFrame:
    """Train a small model in this process."""
    seed_everything(0)
    model = timm.create_model("deit_nano", depth=1, drop_rate=0.1)
    description = {"model": "deit_nano", "arguments": {"depth": 1}}

    def validate(trained):
        return metrics(trained, predict(trained, VALIDATION))

    return fit(model, TRAIN, TaskLoss(0.1), CONFIG, folder, validate, description=description)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run of ``train``."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


# ---- stops at chosen moments, in this process ----


def test_a_stop_at_any_write(tmp_path, whole, monkeypatch):
    moves, at = 0, 0
    replace = os.replace

    def cut_off(source, target):
        nonlocal moves
        moves += 1
        if moves == at:
            raise PowerCut
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", cut_off)
    for at in range(1, 100):
        moves, folder = 0, tmp_path / str(at)
        try:
            train(folder)
        except PowerCut:
            train(folder)
            assert_same(folder, whole)
        else:
            break
    assert at > 12  # three epochs, five files


# ---- damaged states ----


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """The folder of a run that was cut off in its third epoch."""

    def cut_off(losses):
        raise PowerCut

    with monkeypatch.context() as patch:
        at_batch(patch, TaskLoss, 6, cut_off)  # of two batches an epoch
        with pytest.raises(PowerCut):
            train(tmp_path)
    assert finished_epochs(tmp_path) == 2
    return tmp_path


@pytest.mark.parametrize("kept", [0, 20, 5000, -1])
def test_a_damaged_state_is_named_and_the_one_before_it_taken(unfinished, whole, kept, capsys):
    path = unfinished / RESUME
    path.write_bytes(path.read_bytes()[:kept])
    capsys.readouterr()
    train(unfinished)
    output = capsys.readouterr().out
    assert f"{path} is damaged" in output and "going on after epoch 1" in output
    assert_same(unfinished, whole)


def test_one_changed_byte_of_a_state_is_noticed(unfinished, whole, capsys):
    path = unfinished / RESUME
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    train(unfinished)
    assert "its checksum does not fit" in capsys.readouterr().out
    assert_same(unfinished, whole)


def test_without_a_whole_state_nothing_is_overwritten(unfinished):
    for name in (RESUME, PREVIOUS):
        (unfinished / name).write_bytes(b"nothing")
    before = {path.name: path.read_bytes() for path in unfinished.iterdir()}
    with pytest.raises(UserError, match="cannot be read; delete") as error:
        train(unfinished)
    assert RESUME in str(error.value) and "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in unfinished.iterdir()} == before


class Bomb:
    """A pickle that runs code when it is loaded."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_state_that_would_run_code_is_refused_and_not_run(unfinished, whole, capsys):
    exploded = unfinished.parent / "exploded"
    pickle.loads(pickle.dumps(Bomb(exploded)))  # it would work
    exploded.unlink()
    content = pickle.dumps(Bomb(exploded), protocol=2)
    (unfinished / RESUME).write_bytes(content + hashlib.sha256(content).digest())
    train(unfinished)
    assert f"{unfinished / RESUME} is not the state of a training" in capsys.readouterr().out
    assert not exploded.exists()
    assert_same(unfinished, whole)


def test_leftovers_of_a_kill_are_removed_in_the_end(unfinished, whole):
    (unfinished / "best.safetensors.tmp").write_bytes(b"half")
    (unfinished / "notes.tmp").write_bytes(b"not ours")
    train(unfinished)
    (unfinished / "notes.tmp").unlink()
    assert_same(unfinished, whole)
