"""Nothing is lost: a training or a notebook that is killed goes on and ends as if it had not been."""

import hashlib
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from conftest import random_images

from avit_lib import checkpoints, cli, losses
from avit_lib.checkpoints import read_json
from avit_lib.config import StudyError, Training
from avit_lib.evaluation import metrics, predict
from avit_lib.losses import TaskLoss
from avit_lib.study import Study
from avit_lib.training import PREVIOUS, RESUME, fit, seed_everything

ROOT = Path(__file__).parents[1]
EPOCHS = 20
CONFIG = Training(epochs=3, learning_rate=2e-3, batch_size=16, ema_decay=0.9, mixup=0.8)
TRAIN, VALIDATION = random_images(32), random_images(20, seed=1)


class PowerCut(Exception):
    """What stops a run from outside."""


def train(folder: Path) -> pd.DataFrame:
    """Train a small model in this process."""
    seed_everything(0)
    model = timm.create_model("deit_nano_patch7_28", depth=1, drop_rate=0.1)
    description = {"model": "deit_nano_patch7_28", "arguments": {"depth": 1}}

    def validate(trained):
        return metrics(trained, predict(trained, VALIDATION))

    return fit(model, TRAIN, TaskLoss(0.1), CONFIG, folder, validate, description=description)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run of ``train``."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


def content(folder: Path) -> dict:
    """What a run left: weights byte for byte, all else without the seconds."""
    found = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    for path in folder.glob("*.json"):
        found[path.name] = read_json(path)
        found[path.name].get("validation", {}).pop("seconds", None)
        found[path.name].pop("provenance", None)
    found["history.csv"] = pd.read_csv(folder / "history.csv").drop(columns="seconds").to_csv()
    return found


def assert_same(folder: Path, whole: Path):
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert content(folder) == content(whole)


# ---- kill -9 ----


def arguments(folder: Path) -> list[str]:
    return ["fit", "--profile", "smoke", "--device", "cpu", "--epochs", str(EPOCHS), "--output", str(folder)]


def train_in_a_process(folder: Path) -> None:
    torch.set_num_threads(1)
    sys.exit(cli.main(arguments(folder)))


def finished_epochs(folder: Path) -> int:
    return len((folder / "history.csv").read_text().splitlines()) - 1 if (folder / "history.csv").is_file() else 0


def test_a_training_killed_at_any_moment_ends_as_if_it_had_not_been(tmp_path):
    # Processes of their own, forked from a server that has nothing but the imports done.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["avit_lib.cli"])
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    moments = random.Random(0)
    for after in (*sorted(moments.sample(range(EPOCHS - 5), 5)), None):
        process = context.Process(target=train_in_a_process, args=(pieces,))
        process.start()
        if after is None:
            process.join()
            assert process.exitcode == 0
            break
        while finished_epochs(pieces) < after:
            assert process.is_alive()
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.2))  # an epoch takes about as long
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert cli.main(arguments(whole)) == 0  # in this process: the same command gives the same, bit for bit
    assert_same(pieces, whole)


def test_the_same_command_gives_the_same_metrics_file(tmp_path):
    for folder in (tmp_path / "first", tmp_path / "second"):
        assert cli.main(["fit", "--profile", "smoke", "--device", "cpu", "--output", str(folder)]) == 0
        assert cli.main(["test", "--profile", "smoke", "--ckpt", str(folder / "last.safetensors")]) == 0
    assert_same(tmp_path / "first", tmp_path / "second")
    assert "intervals" in content(tmp_path / "first")["last_test.json"]


def test_make_reproduce_killed_in_the_middle_of_a_training_goes_on(tmp_path, monkeypatch):
    for file in ("Makefile", "pyproject.toml", "requirements.lock", "notebooks/02_finetune_deit.ipynb"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "avit_lib").mkdir()  # that is how the root of the study is known
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("AVIT_DATA", str(ROOT / "data"))
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path / "pieces"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    installed = ("-o", "setup", "-o", f"{sys.prefix}/.avit-setup")
    command = ["make", *installed, "reproduce", "PROFILE=smoke", f"VENV={sys.prefix}"]

    def start() -> subprocess.Popen:
        outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, **outputs, start_new_session=True)

    checkpoints, notebook = "smoke/checkpoints/deit", "smoke/notebooks/02_finetune_deit.ipynb"
    killed = start()
    while finished_epochs(tmp_path / "pieces" / checkpoints) < 1:
        assert killed.poll() is None
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()  # until the kernel, which notices within a second, is gone too
    assert not (tmp_path / "pieces" / notebook).exists()
    again = start()
    output, _ = again.communicate()
    assert again.returncode == 0, output
    assert "going on with the run that was interrupted" in output
    assert (tmp_path / "pieces" / notebook).is_file()
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path / "whole"))
    Study("smoke", device="cpu").train("deit")
    assert_same(tmp_path / "pieces" / checkpoints, tmp_path / "whole" / checkpoints)


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

    monkeypatch.setattr(checkpoints.os, "replace", cut_off)
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


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    command = ["fit", "--profile", "smoke", "--epochs", "2", "--device", "cpu", "--output", str(tmp_path / "pieces")]
    calls, compute = 0, losses.AdaptiveLoss.__call__

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == 9:  # of six batches an epoch
            raise KeyboardInterrupt
        return compute(*arguments)

    monkeypatch.setattr(losses.AdaptiveLoss, "__call__", interrupted)
    assert cli.main(command) == 130
    assert "the same command goes on after the last finished epoch" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert "going on after epoch 1" in capsys.readouterr().out
    assert cli.main([*command[:-1], str(tmp_path / "whole")]) == 0
    assert_same(tmp_path / "pieces", tmp_path / "whole")


# ---- damaged states ----


@pytest.fixture
def unfinished(tmp_path, monkeypatch):
    """The folder of a run that was cut off in its third epoch."""
    calls, compute = 0, TaskLoss.__call__

    def cut_off(*arguments):
        nonlocal calls
        calls += 1
        if calls == 6:  # of two batches an epoch
            raise PowerCut
        return compute(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TaskLoss, "__call__", cut_off)
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
    with pytest.raises(StudyError, match="cannot be read; delete") as error:
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
    train(unfinished)
    assert_same(unfinished, whole)
