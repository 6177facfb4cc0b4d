"""Two processes do what one does: the same losses and gradients, every image evaluated once, one
that writes.
"""

import multiprocessing
import os
import socket
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from conftest import random_images

from avit_lib.errors import UserError
from avit_lib.losses import AdaptiveLoss, TaskLoss
from avit_lib.study.study import predict
from avit_lib.training import Training, fit, processes, seed_everything

PROCESSES = 2
NAME = "avit_nano"
TRAIN = random_images(64)
EVALUATED = (37, 1)  # images: not a multiple of the processes, fewer than them
EXECUTIONS = {
    "masked": -3.0,
    "packed": -1.0,
}  # beta: with -1 some layers get no token, and no gradient


def small_model(beta: float) -> torch.nn.Module:
    seed_everything(0)
    return timm.create_model(NAME, beta=beta)


def train(folder: Path, execution: str, images=TRAIN, batch_size: int = 16) -> dict:
    """The losses of each step of a training, means over the processes, the images of each, the
    weights it ends with.
    """
    model = small_model(EXECUTIONS[execution])
    model.execution = execution
    weights = {"alpha_ponder": 0.01, "alpha_distr": 1.0, "target_depth": 2.0}
    compute, steps = AdaptiveLoss(**weights, task=TaskLoss(0.1), average=processes.mean), []
    shares = []

    def recorded(model, images, labels, progress):
        losses = compute(model, images, labels, progress)
        steps.append({"total": losses.total, **losses.parts})
        shares.append(len(images))
        return losses

    config = Training(epochs=2, learning_rate=2e-3, batch_size=batch_size, warmup_epochs=0)
    fit(
        model,
        images,
        recorded,
        config,
        folder,
        lambda trained: {"accuracy": 0.0},
        description={"model": NAME, "arguments": {}},
    )
    steps = [
        {name: processes.mean(value.detach()).item() for name, value in step.items()}
        for step in steps
    ]
    return {"steps": steps, "weights": model.state_dict(), "shares": shares}


def results(folder: Path) -> dict:
    """What the tests compare, computed by one process or by several together."""
    found = {execution: train(folder / execution, execution) for execution in EXECUTIONS}
    for count in EVALUATED:
        predictions = predict(
            small_model(-3.0), random_images(count, seed=1), torch.device("cpu"), batch_size=10
        )
        found[count] = vars(predictions)
    try:
        train(folder / "odd", "masked", batch_size=15)
    except UserError as error:
        found["odd batch"] = str(error)
    return found


def one_of_several(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with processes.join_others():
        found = results(folder)
        print("said by one")
        torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return results(tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """What each of the processes found."""
    folder = tmp_path_factory.mktemp("several")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["avit_lib.study.study"])
    started = [
        context.Process(target=one_of_several, args=(rank, port, folder))
        for rank in range(PROCESSES)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=600)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_losses_are_those_of_a_single_process(single, several, execution):
    expected = pd.DataFrame(single[execution]["steps"])
    assert single[execution]["shares"] == [16] * 8
    for found in several:
        assert found[execution]["shares"] == [16 // PROCESSES] * 8
        pd.testing.assert_frame_equal(pd.DataFrame(found[execution]["steps"]), expected, rtol=1e-5)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_all_processes_end_with_the_weights_of_a_single_one(single, several, execution):
    for name, expected in single[execution]["weights"].items():
        assert torch.equal(
            several[0][execution]["weights"][name], several[1][execution]["weights"][name]
        )
        torch.testing.assert_close(
            several[0][execution]["weights"][name], expected, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("count", EVALUATED)
def test_every_image_is_evaluated_once_in_its_place(single, several, count):
    for found in several:
        assert torch.equal(found[count]["labels"], single[count]["labels"])
        assert torch.equal(found[count]["depth"], single[count]["depth"])
        torch.testing.assert_close(found[count]["logits"], single[count]["logits"])
        torch.testing.assert_close(found[count]["halting_scores"], single[count]["halting_scores"])


def test_a_batch_that_cannot_be_shared_is_refused(single, several):
    assert "odd batch" not in single
    for found in several:
        assert found["odd batch"] == (
            "a batch of 15 images is no multiple of 2 (2 processes share it): set batch_size (--batch-size) to 14"
        )
