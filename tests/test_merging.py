"""Tokens that merge by thresholds: against a loop over single images, and for bad input."""

from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from conftest import merge_slowly, noise, refused, scatter
from timm.utils import ModelEmaV3
from torch.optim.swa_utils import AveragedModel

from avit_lib.adaptive import adapt, without_thresholds
from avit_lib.flops import counted_flops, flops_of, plain_flops
from avit_lib.merging import IMPORTANCE_WEIGHT, Candidates, merge, pack

SMALL = dict(depth=4, embed_dim=48, num_heads=3, num_classes=7)
ARCHITECTURES = {
    "vit_tiny_patch16_224": dict(img_size=96),
    "deit_tiny_patch16_224": dict(img_size=(64, 128)),
    "deit_tiny_distilled_patch16_224": dict(img_size=96),
    "deit3_small_patch16_224": dict(img_size=96, init_values=0.5),
    "vit_small_patch14_reg4_dinov2": dict(img_size=84, init_values=0.5),
    "vit_base_patch16_clip_224": dict(img_size=96),
    "vit_base_patch16_siglip_224": dict(img_size=96),
    "vit_tiny_patch16_384": dict(img_size=112, global_pool="avg", class_token=False, fc_norm=True),
    "vit_small_patch8_224": dict(img_size=56, qk_norm=True),
}


def make(name="vit_tiny_patch16_224", **settings):
    torch.manual_seed(0)
    return scatter(timm.create_model(name, **(SMALL | ARCHITECTURES[name] | settings)).double())


def photographs(model, number=6):
    """Smooth on one side, busy on the other, each more than the one before."""
    height, width = model.patch_embed.img_size
    pixels = noise(number, 3, height, width, seed=1) * torch.linspace(0, 2, width)
    return pixels * torch.linspace(0.2, 1, number)[:, None, None, None]


def adapted(model, saved=0.2):
    return adapt(model, photographs(model), saved)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("grain", [1, 3])
def test_every_architecture_does_what_a_loop_over_single_images_does(name, grain, monkeypatch):
    monkeypatch.setattr("avit_lib.merging.Packed.grain", grain)
    model = make(name)
    adaptive, images = adapted(model), photographs(model)
    prefix = model.num_prefix_tokens

    def choose(layer, keys, worth):
        likeness = keys @ keys.T
        if model.cls_token is not None:
            likeness -= IMPORTANCE_WEIGHT * (worth / worth[prefix:].mean()).log()[:, None]
        above = []
        for asks in range(prefix + 1, len(keys), 2):
            best = likeness[asks, prefix::2].max(dim=0)
            if best.values > adaptive.thresholds[layer]:
                above.append((best.values.item(), asks, prefix + 2 * best.indices.item()))
        above.sort()  # the least first
        while above and (len(keys) - len(above)) % grain:
            del above[0]
        joins = {asks: into for _, asks, into in above}
        return joins, [place for place in range(len(keys)) if place not in joins]

    logits, trace = adaptive.forward_with_trace(images)
    torch.testing.assert_close(adaptive(images), logits)
    for number, image in enumerate(images):
        expected, depth = merge_slowly(adaptive, image, choose)
        torch.testing.assert_close(logits[number], expected, rtol=1e-8, atol=1e-8)
        assert torch.equal(trace.depth[number], depth)
    assert len(trace.depth.sum(dim=1).unique()) > 1  # images don't all save alike
    assert (trace.depth[:, :prefix] == 4).all() and (trace.depth < 4).any()
    assert torch.equal(without_thresholds(model)(images), model(images))  # bit for bit
    assert torch.equal(adapted(model, 0.0)(images), model(images))


def test_as_much_is_saved_as_was_wished_for():
    model = make(depth=6, embed_dim=96)
    images, depths = photographs(model, 32), []
    plain = plain_flops(model, model.patch_embed.num_patches + 1)
    for spread, weight in ((0.0, 0.2), (2.0, 0.2), (2.0, 0.0)):
        adaptive = without_thresholds(model, weight)
        adaptive.spread = spread
        adaptive.calibrate(images, 0.5)
        trace = adaptive.forward_with_trace(images)[1]
        flops = flops_of(adaptive, trace)
        assert 1 - flops.mean().item() / plain == pytest.approx(0.5, abs=0.005)
        assert counted_flops(adaptive, images[:1]) == pytest.approx(flops[0].item(), rel=0.03)
        depths.append(trace.depth)
    early, late, alike = depths
    assert (early == 1).sum() > (late == 1).sum()
    assert not torch.equal(late, alike)


def test_it_is_turned_to_another_budget_saved_loaded_and_trained():
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adaptive, images = adapted(model, 0.1), photographs(model)
    adaptive.calibrate(images, 0.3)
    again = without_thresholds(make(), 0.0)
    again.load_state_dict(adaptive.state_dict())
    assert torch.equal(again(images), adapted(model, 0.3)(images))
    again.train()(images).square().sum().backward()
    assert all(weights.grad.isfinite().all() for weights in again.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("average", [ModelEmaV3, partial(AveragedModel, use_buffers=True)])
def test_an_average_of_the_weights_merges_as_they_do(average):
    adaptive = adapted(make())
    found, images = average(adaptive), photographs(adaptive)
    update = getattr(found, "update_parameters", None) or found.update
    for _ in range(3):
        update(adaptive)
    assert torch.equal(found.module.thresholds, adaptive.thresholds)
    assert torch.equal(found.module(images), adaptive(images))


def test_what_decides_who_merges_is_single_precision_and_nobody_else_s():
    own = torch.tensor(0.5)
    adaptive = without_thresholds(make(), own)
    own *= 2
    assert adaptive.importance_weight == 0.5
    whole = without_thresholds(make(), 0)
    whole.load_state_dict(adaptive.state_dict())
    assert whole.importance_weight == 0.5


def test_thresholds_are_one_for_each_layer():
    adaptive = adapted(make())
    adaptive.thresholds = adaptive.thresholds[:3]
    with refused("3 thresholds do not fit 4 layers"):
        adaptive(photographs(adaptive))


def with_nan():
    model = make()
    model.blocks[0].mlp.fc1.weight.data[0, 0] = torch.nan
    return model


def hooked():
    model = make()
    model.register_forward_pre_hook(lambda *_: None)
    return model


def mixing():
    model = make()
    model.blocks[1].ls1 = torch.nn.Softmax(dim=1)  # over tokens
    return model


BAD_MODELS = {
    "it has hooks": hooked,
    "a Softmax of its blocks is not timm's plain one": mixing,
    "AViT cannot be adapted: it is no plain": lambda: timm.create_model("avit_nano"),
    "half precision": lambda: make().bfloat16(),
    "weights that are no numbers": with_nan,
}


@pytest.mark.parametrize("reason", BAD_MODELS)
def test_a_model_that_cannot_be_adapted_is_told_why(reason):
    with refused(reason):
        adapt(BAD_MODELS[reason](), torch.zeros(4, 3, 96, 96), 0.3)


def interrupt(share):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("change", "saved", "message"),
    [
        (lambda images: images[:1], 0.3, "1 images are too few"),
        (lambda images: images / 0, 0.3, "no numbers"),
        (list, 0.2, "one tensor of floats"),
        (torch.Tensor.byte, 0.2, "one tensor of floats"),
        (torch.clone, -0.1, "between 0 and 0.8"),
        (torch.clone, 0.8, "out of reach"),
    ],
)
def test_a_bad_or_interrupted_calibration_changes_nothing(change, saved, message):
    adaptive = adapted(make())
    before, images = adaptive.thresholds.clone(), photographs(adaptive)
    with refused(message):
        adaptive.calibrate(change(images), saved)
    with pytest.raises(KeyboardInterrupt):
        adaptive.calibrate(images, 0.1, interrupt)
    assert torch.equal(adaptive.thresholds, before)


def test_a_token_that_stands_for_several_weighs_as_many():
    packed = replace(pack(torch.tensor([[[0.0], [6.0], [3.0]]]), 4), size=torch.tensor([1.0, 2, 1]))
    found = Candidates(torch.tensor([[-torch.inf, 1, -torch.inf]]), torch.tensor([[0, 2, 0]]))
    merged = merge(packed, [found], threshold=0.5, layer=2)
    assert merged.tokens.tolist() == [[0.0], [5.0]]
