"""Nothing is lost: a training that is killed or stopped goes on as if it had not been."""

import multiprocessing
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import torch
from conftest import assert_same, at_batch, finished_epochs

from avit_lib import cli
from avit_lib.losses import TaskLoss

ROOT = Path(__file__).parents[1]
EPOCHS = 8


def command(folder, epochs=EPOCHS):
    options = {"--profile": "smoke", "--model": "deit", "--device": "cpu"}
    options |= {"--epochs": epochs, "--output": folder}
    return ["fit", *(str(word) for option in options.items() for word in option)]


def wait_for(epochs, folder, lives):
    """Wait until so many epochs of the run in ``folder`` are finished."""
    while finished_epochs(folder) < epochs:
        assert lives()
        time.sleep(0.005)


def train_in_a_process(folder):
    torch.set_num_threads(1)
    sys.exit(cli.main(command(folder)))


def test_a_training_killed_at_any_moment_ends_as_if_it_had_not_been(tmp_path):
    # Processes of their own, forked from a server that has nothing but the imports done.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["avit_lib.cli"])
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    moments = random.Random(0)
    for after in sorted(moments.sample(range(EPOCHS - 2), 3)):
        process = context.Process(target=train_in_a_process, args=(pieces,))
        process.start()
        wait_for(after, pieces, process.is_alive)
        time.sleep(moments.uniform(0, 0.2))  # an epoch takes about as long
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert cli.main(command(pieces)) == 0
    assert cli.main(command(whole)) == 0
    assert_same(pieces, whole)


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupt(losses):
        raise KeyboardInterrupt

    at_batch(monkeypatch, TaskLoss, 5, interrupt)  # of three batches an epoch
    assert cli.main(command(tmp_path, 2)) == 130
    assert "run the same command again to resume" in capsys.readouterr().err


def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torchrun = "torch.distributed.run", "--standalone", "--nproc-per-node=2"
    arguments = [sys.executable, "-m", *torchrun, "-m", "avit_lib", *command(tmp_path)]
    launcher = subprocess.Popen(arguments)
    wait_for(2, tmp_path, lambda: launcher.poll() is None)  # what is said of the first is said
    workers = psutil.Process(launcher.pid).children()
    assert len(workers) == 2
    workers[1].kill()
    assert launcher.wait(timeout=600) != 0
    assert not psutil.wait_procs(workers, timeout=600)[1]
    told = re.findall(r", epoch (\d+)/", capfd.readouterr().out)
    assert told and len(told) == len(set(told))  # one process speaks
    assert cli.main(command(tmp_path)) == 0  # here by one process
    gone_on_after = int(re.search(r"going on after epoch (\d+)", capfd.readouterr().out)[1])
    assert gone_on_after in (len(told), len(told) + 1)  # saved, then said
    history = pd.read_csv(tmp_path / "history.csv")
    assert history["epoch"].tolist() == list(range(1, EPOCHS + 1))
