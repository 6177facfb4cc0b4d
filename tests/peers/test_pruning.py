"""EViT, top-k and random patches against a loop over single images: who stays, what is fused."""

import math

import pytest
import timm
import torch
from conftest import leave_slowly, noise, refused, scatter

from avit_lib.flops import trace_model
from avit_lib.peers import make_peers, pruning


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8, 1])
@pytest.mark.parametrize("fuse", [True, False])
def test_it_does_what_a_loop_over_single_images_does(keep, fuse):
    def choose(layer, attention, values):
        worth, rows = attention.mean(dim=0).tolist(), range(1, len(values))
        ranked = sorted(rows, key=lambda row: -worth[row])
        number = math.ceil(keep * len(ranked))
        stay, gone = [0, *ranked[:number]], ranked[number:]
        if layer == 0 or len(gone) <= fuse:  # of four layers, after each quarter
            return [0, *rows], {}
        return stay, {row: worth[row] for row in gone} if fuse else {}

    torch.manual_seed(0)
    model = scatter(timm.create_model("deit_nano").double())
    images = noise(3, 3, 28, 28)
    logits, trace = trace_model(pruning.prune(model, keep, fuse=fuse), images)
    for number, image in enumerate(images):
        expected, depth = leave_slowly(model, image, choose)
        torch.testing.assert_close(logits[number], expected)
        assert torch.equal(trace.depth[number], depth)
    assert torch.allclose(logits, model(images), atol=1e-6) == (keep == 1)


def test_random_patches_are_as_many_but_others():
    model, images = scatter(timm.create_model("deit_nano").double()), noise(8, 3, 28, 28)
    found = make_peers(model, {"Random patches": [0.5], "Top-k attention": [0.5]})
    (logits, trace), (_, best) = (trace_model(peer, images) for peer in found.values())
    assert torch.equal(trace.depth.sort().values, best.depth.sort().values)
    assert not torch.equal(trace.depth, best.depth) and len(trace.depth.unique(dim=0)) > 1
    assert torch.equal(logits, trace_model(found["Random patches, kept = 0.5"], images)[0])


@pytest.mark.parametrize("keep", [0, 1.5])
def test_a_share_that_cannot_be_kept_is_refused(keep):
    with refused("cannot be kept"):
        pruning.prune(timm.create_model("deit_nano"), keep)
