"""Two processes do what one does: the same losses and weights, every image in its place."""

import os
import socket

import pandas as pd
import timm
import torch
import torch.multiprocessing
from conftest import random_images, refused

from avit_lib.losses import AdaptiveLoss
from avit_lib.training import Training, fit, processes, seed_everything

PROCESSES = 2
NAME = "avit_nano"


def train(folder, batch_size=16):
    """The history of a training, and the weights it ends with."""
    seed_everything(processes.rank())  # all start from the weights of the first
    # Some layers get no token, and no gradient.
    model = timm.create_model(NAME, gamma=1.0, beta=1.0, execution="packed")
    loss = AdaptiveLoss(alpha_distr=1.0, target_depth=2.0, average=processes.mean)
    config = Training(epochs=2, learning_rate=2e-3, batch_size=batch_size, warmup_epochs=0)
    history = fit(
        model,
        random_images(64),
        loss,
        config,
        folder,
        lambda trained: {"accuracy": 0.0},
        description={"model": NAME, "arguments": {}},
    )
    return {"history": history.filter(like="train_").to_dict("list"), **model.state_dict()}


def join_and_compute(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with refused("WORLD_SIZE is set, but not LOCAL_WORLD_SIZE"), processes.join_others():
        pass
    os.environ["LOCAL_WORLD_SIZE"] = str(PROCESSES)
    with processes.join_others():
        found = train(folder / "several")
        with refused("a multiple of 2, at most the 64 training images"):
            train(folder / "odd", batch_size=15)
    torch.save(found, folder / f"{rank}.pt")


def test_losses_and_weights_are_those_of_a_single_process(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        join_and_compute, (port, tmp_path), PROCESSES, start_method="forkserver"
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES))
    single = train(tmp_path / "single")
    history = pd.DataFrame(single.pop("history"))
    assert first["history"] == second["history"]
    pd.testing.assert_frame_equal(pd.DataFrame(first["history"]), history, rtol=1e-5)
    for name, weights in single.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weights, rtol=1e-3, atol=1e-4)
