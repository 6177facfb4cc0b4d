"""Nothing is lost: a training that is killed or stopped goes on as if it had not been."""

import re
import subprocess
import sys
import time

import pandas as pd
import psutil
from conftest import ROOT, at_batch

from avit_lib import cli
from avit_lib.losses import TaskLoss

EPOCHS = 8


def command(folder, epochs=EPOCHS):
    options = "fit --profile smoke --model deit --device cpu"
    return [*options.split(), "--epochs", str(epochs), "--output", str(folder)]


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupt(losses):
        raise KeyboardInterrupt

    at_batch(monkeypatch, TaskLoss, 5, interrupt)  # of three batches an epoch
    assert cli.main(command(tmp_path, 2)) == 130
    assert "run the same command again to resume" in capsys.readouterr().err


def test_a_killed_process_ends_the_other_and_the_run_goes_on(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torchrun = "torch.distributed.run", "--standalone", "--nproc-per-node=2"
    arguments = [sys.executable, "-m", *torchrun, "-m", "avit_lib", *command(tmp_path)]
    launcher = subprocess.Popen(arguments)
    history = tmp_path / "history.csv"
    # When the second epoch is on record, the first has been told.
    while not history.is_file() or "\n2," not in history.read_text():
        assert launcher.poll() is None
        time.sleep(0.005)
    workers = psutil.Process(launcher.pid).children()
    assert len(workers) == 2
    workers[0].kill()  # the one that writes
    assert launcher.wait(timeout=600) != 0
    assert not psutil.wait_procs(workers, timeout=600)[1]
    told = re.findall(r", epoch (\d+)/", capfd.readouterr().out)
    assert told and len(told) == len(set(told))  # one process speaks
    assert cli.main(command(tmp_path)) == 0  # here by one process
    gone_on_after = int(re.search(r"going on after epoch (\d+)", capfd.readouterr().out)[1])
    assert gone_on_after in (len(told), len(told) + 1)  # saved, then said
    assert pd.read_csv(history)["epoch"].tolist() == list(range(1, EPOCHS + 1))
