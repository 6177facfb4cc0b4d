"""Nothing is lost: a command, a notebook or one of several processes that is killed goes on as if
it had not been.
"""

import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import torch
from conftest import assert_same, at_batch, content, finished_epochs

from avit_lib import cli
from avit_lib.losses import AdaptiveLoss
from avit_lib.study import Study

ROOT = Path(__file__).parents[1]
EPOCHS = 8


def arguments(folder: Path) -> list[str]:
    return [
        "fit",
        "--profile",
        "smoke",
        "--device",
        "cpu",
        "--epochs",
        str(EPOCHS),
        "--output",
        str(folder),
    ]


def train_in_a_process(folder: Path) -> None:
    torch.set_num_threads(1)
    sys.exit(cli.main(arguments(folder)))


def test_a_training_killed_at_any_moment_ends_as_if_it_had_not_been(tmp_path):
    # Processes of their own, forked from a server that has nothing but the imports done.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["avit_lib.cli"])
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    moments = random.Random(0)
    for after in (*sorted(moments.sample(range(EPOCHS - 2), 3)), None):
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
    assert (
        cli.main(arguments(whole)) == 0
    )  # in this process: the same command gives the same, bit for bit
    assert_same(pieces, whole)


def test_the_same_command_gives_the_same_metrics_file(tmp_path):
    for folder in (tmp_path / "first", tmp_path / "second"):
        assert (
            cli.main(["fit", "--profile", "smoke", "--device", "cpu", "--output", str(folder)]) == 0
        )
        assert (
            cli.main(["test", "--profile", "smoke", "--ckpt", str(folder / "last.safetensors")])
            == 0
        )
    assert_same(tmp_path / "first", tmp_path / "second")
    assert "intervals" in content(tmp_path / "first")["last_test.json"]


def test_make_reproduce_killed_in_the_middle_of_a_training_goes_on(tmp_path, monkeypatch):
    for file in (
        "Makefile",
        "pyproject.toml",
        "requirements.lock",
        "notebooks/02_finetune_deit.ipynb",
    ):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    (tmp_path / "avit_lib").mkdir()  # that is how the root of the study is known
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("AVIT_DATA", str(ROOT / "data"))
    monkeypatch.setenv("AVIT_WEIGHTS", str(ROOT / "data" / "weights"))
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


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    command = [
        "fit",
        "--profile",
        "smoke",
        "--epochs",
        "2",
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "pieces"),
    ]

    def interrupted(losses):
        raise KeyboardInterrupt

    at_batch(monkeypatch, AdaptiveLoss, 5, interrupted)  # of three batches an epoch
    assert cli.main(command) == 130
    assert "run the same command again to resume" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert "going on after epoch 1" in capsys.readouterr().out
    assert cli.main([*command[:-1], str(tmp_path / "whole")]) == 0
    assert_same(tmp_path / "pieces", tmp_path / "whole")


def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    fit = [
        "fit",
        "--profile",
        "smoke",
        "--device",
        "cpu",
        "--epochs",
        str(EPOCHS),
        "--output",
        str(tmp_path / "run"),
    ]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    launcher = subprocess.Popen(
        [*torchrun, "-m", "avit_lib", *fit],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    history = tmp_path / "run" / "history.csv"
    while finished_epochs(tmp_path / "run") < 2:  # what is said of the first is said
        assert launcher.poll() is None
        time.sleep(0.005)
    workers = psutil.Process(launcher.pid).children()
    assert len(workers) == 2
    workers[1].kill()
    output, error = launcher.communicate(timeout=600)
    assert launcher.returncode != 0
    assert "SIGKILL" in error
    assert not psutil.wait_procs(workers, timeout=600)[1]
    told = [line for line in output.splitlines() if ", epoch " in line]
    assert told and len(told) == len({line.split(":")[0] for line in told})  # one process speaks
    assert cli.main(fit) == 0  # here by one process
    gone_on_after = int(re.search(r"going on after epoch (\d+)", capfd.readouterr().out)[1])
    assert gone_on_after in (len(told), len(told) + 1)  # saved, then said
    assert pd.read_csv(history)["epoch"].tolist() == list(range(1, EPOCHS + 1))
