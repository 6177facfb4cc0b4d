"""The three terms of the objective against hand computations."""

import math
from functools import partial

import pytest
import timm
import torch
import torch.distributed as dist
from conftest import bright_and_dark, refused, varied_model
from torch import nn
from torch.testing import assert_close

import avit_lib
from avit_lib.losses import (
    AdaptiveLoss,
    TaskLoss,
    distillation_loss,
    distribution_loss,
    halting_distribution,
    target_distribution,
)

LABELS = torch.tensor([3, 1, 4, 1])


def test_halting_distribution_by_hand():
    # Two images, two layers, a class token and two patches; the class token (9.0) must not count.
    scores = torch.tensor([[[9.0, 0.1, 0.3], [9.0, 1.0, 0.0]], [[9.0, 0.2, 0.2], [9.0, 1.0, 1.0]]])
    expected = torch.tensor([0.8 / 4, 3.0 / 4]) / (3.8 / 4)
    assert_close(halting_distribution(scores), expected)


def test_target_by_hand():
    ratio = math.exp(4)  # of exp(-0.5) and exp(-4.5), at a distance of one and three deviations
    expected = torch.tensor([1, ratio, ratio, 1]) / (2 + 2 * ratio)
    assert_close(target_distribution(2.5, 0.5, layers=4), expected)
    assert target_distribution(8.0, 1.0, layers=12).argmax().item() == 7  # layers count from 1


def test_divergence_by_hand_in_both_directions():
    found, target = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    # log 2 / 2 + log(2 / 3) / 2, and log(1 / 2) / 4 + 3 log(3 / 2) / 4
    assert distribution_loss(found, target).item() == pytest.approx(0.143841, rel=1e-5)
    assert distribution_loss(found, target, "code").item() == pytest.approx(0.130812, rel=1e-5)


@pytest.mark.parametrize(
    ("direction", "progress", "alpha_ponder"), [("paper", 1.0, 0.25), ("code", 0.1, 0.0625)]
)
def test_the_objective_is_the_weighted_sum_of_its_terms(direction, progress, alpha_ponder):
    model, images = varied_model(0.5), bright_and_dark()
    settings = dict(alpha_ponder=0.25, ponder_ramp=0.4, alpha_distr=0.5, target_depth=3.0)
    loss = AdaptiveLoss(**settings, kl_direction=direction, task=TaskLoss(0.1))
    losses = loss(model, images, LABELS, progress)
    parts = losses.parts
    expected = parts["task"] + alpha_ponder * parts["ponder"] + 0.5 * parts["distr"]
    assert_close(losses.total, expected)
    logits, trace = model.forward_with_trace(images)
    target = target_distribution(3.0, 1.0, layers=6)
    logs = logits.log_softmax(dim=1)
    expected = {
        "task": -(0.9 * logs[torch.arange(4), LABELS] + 0.1 * logs.mean(dim=1)).mean(),
        "ponder": trace.ponder.mean(),
        "distr": distribution_loss(halting_distribution(trace.halting_scores), target, direction),
        "depth": trace.depth.double().mean(),
    }
    assert_close(parts, expected, check_dtype=False)
    assert min(parts.values()) > 0.01


# --- in other people's loops ----------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


DDP = partial(nn.parallel.DistributedDataParallel, find_unused_parameters=True)


@pytest.mark.parametrize("wrapper", [DDP, partial(torch.compile, backend="eager")])
def test_a_wrapped_model_has_the_loss_and_the_gradient_of_the_bare_one(wrapper, one_process):
    found = []
    for wrap in (lambda model: model, wrapper):
        model = varied_model(0.5, execution="packed").train()
        loss = AdaptiveLoss(alpha_ponder=0.25, target_depth=3.0)
        wrapped = wrap(model)  # DDP must live until backward
        total = loss(wrapped, bright_and_dark(), LABELS).total
        total.backward()
        found.append([total.detach(), *(parameter.grad for parameter in model.parameters())])
    assert_close(*found)


def test_autocast_around_forward_reaches_the_blocks_and_the_terms_are_float32():
    """As accelerate prepares a model."""
    model = varied_model(0.5, execution="packed").float().train()
    images = bright_and_dark().float()
    loss, half = AdaptiveLoss(), torch.autocast("cpu", torch.bfloat16)
    with half:
        around = loss(model, images, LABELS)
    model.forward = half(model.forward)
    inside = loss(model, images, LABELS)
    assert_close(inside.parts, around.parts)
    assert model(images).dtype == torch.bfloat16 != inside.total.dtype


def test_a_model_without_halting_scores_is_refused():
    plain, images = timm.create_model("deit_nano"), bright_and_dark().float()
    for model in (plain, avit_lib.adapt(plain, images, saved=0.2)):
        with refused("needs the halting scores of an A-ViT"):
            AdaptiveLoss()(model, images, LABELS)


# --- at the extremes ------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["paper", "code"])
def test_the_divergence_is_finite_of_layers_in_which_nothing_halts(direction):
    found = torch.tensor([0.0, 1.0, 0.0], requires_grad=True)
    loss = distribution_loss(found, target_distribution(3.0, 0.1, layers=3), direction)
    loss.backward()
    assert loss.isfinite() and found.grad.isfinite().all()


def test_distillation_by_hand():
    # The teacher says 3/4, 1/4; the student 1/2, 1/2 of the first image, and the same of the second
    teacher = torch.tensor([[math.log(3), 0.0]]).expand(2, 2)
    student = teacher * torch.tensor([[0.0], [1.0]])
    expected = 0.130812 / 2  # 3 log(3 / 2) / 4 + log(1 / 2) / 4, mean over both
    assert distillation_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_a_teacher_adds_its_term_and_learns_nothing():
    model, images = varied_model(0.5), bright_and_dark()
    other = varied_model(0.0, beta=-3.0)
    tasks = TaskLoss(0.1), TaskLoss(0.1, other, 0.25)
    alone, taught = (AdaptiveLoss(task=task)(model, images, LABELS) for task in tasks)
    expected = distillation_loss(model(images), other(images))
    assert_close(taught.parts, alone.parts | {"distillation": expected})
    assert_close(taught.total, alone.total + 0.25 * expected)
    taught.total.backward()
    assert other.head.weight.grad is None and model.head.weight.grad.any()
