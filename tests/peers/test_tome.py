"""Token merging against a loop over single images: what merges, what stands for it, how deep."""

import pytest
import timm
import torch
from conftest import merge_slowly, noise, refused, scatter

from avit_lib.adaptive import without_thresholds
from avit_lib.flops import trace_model
from avit_lib.peers import tome


@pytest.mark.parametrize("r", [0, 1, 5, 100])
def test_it_does_what_a_loop_over_single_images_does(r):
    def choose(layer, keys, worth):
        likeness = keys @ keys.T
        best = {asks: likeness[asks, 1::2].max(dim=0) for asks in range(2, len(keys), 2)}
        chosen = sorted(best, key=lambda asks: -best[asks].values)[:r]
        joins = {asks: 1 + 2 * best[asks].indices.item() for asks in chosen}
        rest = [place for place in range(0, len(keys), 2) if place not in joins]
        return joins, [*rest, *range(1, len(keys), 2)]

    torch.manual_seed(0)
    model = scatter(timm.create_model("deit_nano").double())
    images = noise(3, 3, 28, 28)
    plain = model(images)
    logits, trace = trace_model(tome.merge_tokens(model, r), images)
    for number, image in enumerate(images):
        expected, depth = merge_slowly(model, image, choose)
        torch.testing.assert_close(logits[number], expected)
        assert torch.equal(trace.depth[number], depth)
    assert torch.allclose(logits, plain, atol=1e-6) == (r == 0)
    assert torch.equal(model(images), plain)


def test_the_class_token_is_alone_and_first_even_among_equals():
    keys = torch.ones(1, 17, 8)
    stay, gone, target = tome.match(keys, 8)
    assert stay.tolist() == [[0, *range(1, 17, 2)]]
    assert sorted(gone[0].tolist()) == [*range(2, 17, 2)] and target.min() > 0


def test_what_cannot_merge_is_refused():
    plain, registers = timm.create_model("deit_nano"), timm.create_model("deit_nano", reg_tokens=1)
    halting, adaptive = timm.create_model("avit_nano"), without_thresholds(plain)
    pooled = timm.create_model("deit_nano", global_pool="avg")
    hooked = timm.create_model("deit_nano")
    hooked.register_forward_pre_hook(lambda *_: None)
    for model in (halting, adaptive, registers, pooled, hooked):
        with refused("a peer takes a plain"):
            tome.merge_tokens(model, 2)
    for r, step in ((-1, 1), (2.5, 1), (2, 0), (2, 1.5)):
        with refused("whole numbers"):
            tome.merge_tokens(plain, r, step)


@pytest.mark.parametrize("part", ["", "1", "1.attn", "1.attn.attn_drop", "1.drop_path1"])
def test_a_hook_that_would_never_be_called_is_refused(part):
    model = tome.merge_tokens(timm.create_model("deit_nano"), 2)
    hook = model.blocks.get_submodule(part).register_forward_hook(lambda *_: None)
    with refused("a hook on a block"):
        model(noise(3, 3, 28, 28))
    hook.remove()
    model.model.norm.register_forward_hook(lambda *_: None)
    with refused("a hook on the model or its norm is not called"):
        model(noise(3, 3, 28, 28))
