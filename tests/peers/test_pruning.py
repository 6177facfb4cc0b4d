"""EViT, top-k and random patches against a loop over single images: who stays, what is fused."""

import math

import pytest
import timm
import torch
from conftest import noise, refused, scatter

from avit_lib.flops import trace_model
from avit_lib.peers import make_peers, pruning


def prune_slowly(model, image, keep, fuse):
    """Logits [K] and depth [N] of an image [C, H, W], token by token, by the paper's section 3."""
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    depth = torch.full((len(tokens),), len(model.blocks))
    places = [*range(len(tokens))]  # of each token in the image; None: made of others
    for layer, block in enumerate(model.blocks):
        qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, block.attn.num_heads, -1))
        q, k, v = qkv.unbind(1)
        attention = (torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5).softmax(dim=-1)
        taken = torch.einsum("hqk,khd->qhd", attention, v).flatten(1)
        tokens = tokens + block.attn.proj(taken)
        if layer in (1, 2, 3):  # of four layers, after each quarter
            worth = attention[:, 0].mean(dim=0).tolist()
            ranked = sorted(range(1, len(tokens)), key=lambda one: -worth[one])
            number = math.ceil(keep * len(ranked))
            stay, gone = [0, *ranked[:number]], ranked[number:]
            if len(gone) > fuse:
                for one in gone:
                    if places[one] is not None:
                        depth[places[one]] = layer + 1
                fused = sum(worth[one] * tokens[one] for one in gone)
                tokens = torch.stack([*tokens[stay], *[fused] * fuse])
                places = [*(places[one] for one in stay), *[None] * fuse]
        tokens = tokens + block.mlp(block.norm2(tokens))
    return model.forward_head(model.norm(tokens[None]))[0], depth


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8, 1])
@pytest.mark.parametrize("fuse", [True, False])
def test_it_does_what_a_loop_over_single_images_does(keep, fuse):
    torch.manual_seed(0)
    model = scatter(timm.create_model("deit_nano").double())
    images = noise(3, 3, 28, 28)
    logits, trace = trace_model(pruning.prune(model, keep, fuse=fuse), images)
    for number, image in enumerate(images):
        expected, depth = prune_slowly(model, image, keep, fuse)
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
