"""Adaptive token sampling against a loop over single images: who is hit, in each image others."""

import pytest
import timm
import torch
from conftest import leave_slowly, noise, refused, scatter

from avit_lib.flops import counted_flops, flops_of, plain_flops, trace_model
from avit_lib.peers import ats


def gradients(model, logits):
    """Of a loss in which each image counts otherwise, for all weights."""
    return torch.autograd.grad((logits * noise(*logits.shape, seed=1)).sum(), [*model.parameters()])


@pytest.mark.parametrize("most", [1, 5, 16, 1000])
@pytest.mark.parametrize("images", [1, 6])
def test_it_does_what_a_loop_over_single_images_does(most, images):
    def choose(layer, attention, values):
        if layer in (0, 3):  # of four: after the first quarter, but the last
            return [*range(len(values))], {}
        worth = (attention.T * values.norm(dim=-1)).sum(dim=1)[1:].tolist()
        hit = {0}
        for number in range(most):
            wanted, patch = (number + 0.5) / most * sum(worth), 0
            while sum(worth[: patch + 1]) < wanted:
                patch += 1
            hit.add(1 + patch)
        return sorted(hit), {}

    torch.manual_seed(0)
    model = scatter(timm.create_model("deit_nano").double())
    images = noise(images, 3, 28, 28)
    logits, trace = trace_model(ats.TokenSampling(model, most), images)
    slow, depth = zip(*(leave_slowly(model, image, choose) for image in images), strict=True)
    torch.testing.assert_close(logits, torch.stack(slow))
    assert torch.equal(trace.depth, torch.stack(depth))
    torch.testing.assert_close(gradients(model, logits), gradients(model, torch.stack(slow)))
    assert torch.allclose(logits, model(images), atol=1e-6) == (most == 1000)


def test_each_image_keeps_its_own_number_and_the_others_are_not_computed():
    torch.manual_seed(0)
    model = scatter(timm.create_model("deit_nano"))
    peer, images = ats.TokenSampling(model, 8), torch.randn(6, 3, 28, 28)
    trace = trace_model(peer, images)[1]
    assert len((trace.depth == 4).sum(dim=1).unique()) > 1
    predicted = flops_of(peer, trace)
    assert predicted.max() < plain_flops(model, 17)
    assert predicted.mean().item() == pytest.approx(counted_flops(peer, images), rel=1e-6)


def test_what_cannot_be_sampled_is_refused():
    for most in (0, 2.5):
        with refused("take a whole number"):
            ats.TokenSampling(timm.create_model("deit_nano"), most)
