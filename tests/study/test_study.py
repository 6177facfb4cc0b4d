"""A study: what its runs start from, and what their checkpoints keep."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import random_images
from msgspec import structs

from avit_lib import training
from avit_lib.adaptive import Adaptive
from avit_lib.data import TrainingData
from avit_lib.errors import UserError
from avit_lib.evaluation import metrics, predict
from avit_lib.flops import plain_flops
from avit_lib.starts import channel_parameters
from avit_lib.study.settings import Halting, Run
from avit_lib.study.study import initial_model, train_run
from avit_lib.training import Training, load_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(
        training, "load_pretrained", lambda *_: None
    )  # there are none of a small model
    halting = Halting(
        beta=-2.5,
        alpha_ponder=1e-3,
        target_depth=2.5,
        target_std=10.0,
        start="class_attention",
        channel_rate=0.0,
    )
    settings = Training(
        epochs=2, learning_rate=1e-3, batch_size=16, weight_decay=0.0, execution="packed"
    )
    return Run(
        name="fitted",
        label="fitted",
        model="avit_nano",
        init="pretrained",
        pretrained="any",
        training=settings,
        halting=halting,
    )


@pytest.fixture
def data():
    return TrainingData(
        random_images(64), random_images(32, seed=1), {"sha256": "", "content": {}}, 28
    )


def channels(model):
    """All that writes or reads channel 0."""
    return [parameter[index].detach().clone() for parameter, index in channel_parameters(model)]


def test_a_run_starts_fitted_and_keeps_it(run, data, tmp_path):
    unfitted_run = structs.replace(
        run, halting=structs.replace(run.halting, start="beta", channel_rate=1.0)
    )
    start = initial_model(run, data, None, 0, CPU)
    plain = initial_model(unfitted_run, data, None, 0, CPU)
    history = train_run(run, data, tmp_path, None, None, 0, CPU)
    assert len(history) == 2
    trained = load_checkpoint(tmp_path / "last.safetensors", CPU)[0]
    kept, after, unfitted = (channels(model) for model in (start, trained, plain))
    assert all(map(torch.equal, kept, after))
    assert not all(map(torch.equal, kept, unfitted))


def test_a_run_that_merges_is_adapted_before_it_is_trained(run, data, tmp_path):
    merging = structs.replace(run, model="deit_nano", halting=None, saved=0.2)
    assert (
        merging.method == "ours" and Run.method.fget(structs.replace(merging, saved=0.0)) == "plain"
    )
    start = initial_model(merging, data, None, 0, CPU)
    train_run(merging, data, tmp_path, None, None, 0, CPU)
    trained, described = load_checkpoint(tmp_path / "last.safetensors", CPU)
    assert (
        isinstance(trained, Adaptive)
        and trained.importance_weight == described["merging"]["importance_weight"]
    )
    assert torch.equal(trained.thresholds, start.thresholds) and trained.thresholds.isfinite().any()
    assert not torch.equal(trained.head.weight, start.head.weight)
    found = predict(trained, data.validation)
    assert (
        metrics(trained, found)["gflops_per_image"]
        < plain_flops(trained, found.depth.shape[1]) / 1e9
    )


def test_a_channel_learns_at_a_rate_of_its_own(run, data, tmp_path):
    """With half the rate it goes about half as far in the first epoch."""
    start, steps = channels(initial_model(run, data, None, 0, CPU)), []
    for rate in (0.5, 1.0):
        halting = structs.replace(run.halting, channel_rate=rate)
        brief = structs.replace(run.training, epochs=1)
        train_run(
            structs.replace(run, halting=halting, training=brief),
            data,
            tmp_path / str(rate),
            None,
            None,
            0,
            CPU,
        )
        after = channels(load_checkpoint(tmp_path / str(rate) / "last.safetensors", CPU)[0])
        steps.append(sum((new - old).abs().sum() for new, old in zip(after, start, strict=True)))
    assert 0.3 < steps[0] / steps[1] < 0.7


def test_weights_that_a_run_lacks_or_cannot_use_are_named(run, data, tmp_path):
    plain = structs.replace(run, name="plain", model="deit_nano", halting=None)
    train_run(plain, data, tmp_path / "plain", None, None, 0, CPU)
    weights, others = (
        tmp_path / "plain" / "last.safetensors",
        replace(data, train=random_images(64, classes=3)),
    )
    for changes, teacher, images, message in (
        (
            {"init": "plain"},
            None,
            data,
            "run 'fitted' starts or learns from run 'plain': name its weights by --ckpt",
        ),
        (
            {"teacher": "plain"},
            None,
            data,
            "learns from run 'plain': name its weights by --teacher",
        ),
        ({}, weights, data, "run 'fitted' has no teacher; leave out --teacher"),
        ({"teacher": "plain"}, weights, others, f"{weights} was trained for other classes"),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as error:
            train_run(
                structs.replace(run, **changes), images, tmp_path / "run", None, teacher, 0, CPU
            )
        assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    taught = structs.replace(run, teacher="plain")
    assert "train_distillation" in train_run(taught, data, tmp_path / "run", None, weights, 0, CPU)


def test_a_model_trained_on_other_pictures_of_these_names_is_not_taken_for_this_one(
    run, data, tmp_path
):
    train_run(run, data, tmp_path, None, None, 0, CPU)
    other = replace(data, split=data.split | {"content": {"train": "another checksum"}})
    with pytest.raises(UserError, match="holds another run"):
        train_run(run, other, tmp_path, None, None, 0, CPU)
