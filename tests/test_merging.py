"""Tokens that merge by thresholds: against a loop over single images, on many architectures, and
for bad input.
"""

from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

import avit_lib
from avit_lib.adaptive import Adaptive, adapt, without_thresholds
from avit_lib.errors import UserError
from avit_lib.evaluation import counted_flops, flops_per_image
from avit_lib.merging import IMPORTANCE_WEIGHT

SMALL = dict(depth=4, embed_dim=48, num_heads=3, num_classes=7)
ARCHITECTURES = {
    "vit_tiny_patch16_224": dict(img_size=96),
    "deit_tiny_patch16_224": dict(img_size=(64, 128)),
    "deit_tiny_distilled_patch16_224": dict(img_size=96),
    "deit3_small_patch16_224": dict(img_size=96, init_values=0.5),
    "vit_small_patch14_reg4_dinov2": dict(img_size=84, init_values=0.5),
    "vit_small_patch14_dinov2": dict(img_size=84, init_values=0.5),
    "vit_base_patch16_clip_224": dict(img_size=96),
    "vit_base_patch16_siglip_224": dict(img_size=96),
    "vit_base_patch32_224": dict(img_size=224),
    "vit_tiny_patch16_384": dict(img_size=112, global_pool="avg", class_token=False, fc_norm=True),
    "vit_small_patch8_224": dict(img_size=56, qk_norm=True),
}


def make(name="vit_tiny_patch16_224", **settings) -> VisionTransformer:
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | ARCHITECTURES[name] | settings)).double().eval()
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # far from the initialisation, at which all tokens are alike
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def photographs(model, number=6) -> torch.Tensor:
    """Smooth on one side, busy on the other, each more than the one before."""
    height, width = model.patch_embed.img_size
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(number, 3, height, width, generator=generator, dtype=torch.float64)
    return (
        noise
        * torch.linspace(0, 2, width, dtype=torch.float64)
        * torch.linspace(0.2, 1, number)[:, None, None, None]
    )


def adapted(model, saved=0.2) -> Adaptive:
    return adapt(model, photographs(model), saved)


def one_image(model: Adaptive, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and depth of an image by a plain loop, nothing packed: groups of places instead of a
    buffer.
    """
    prefix, tokens = model.num_prefix_tokens, model.embed(image[None])[0]
    groups = [[place] for place in range(len(tokens))]
    depth = torch.full((len(tokens),), len(model.blocks))
    for layer, block in enumerate(model.blocks):
        size = torch.tensor([float(len(group)) for group in groups]).double()
        q, k, v = (
            block.attn.qkv(block.norm1(tokens))
            .unflatten(-1, (3, block.attn.num_heads, -1))
            .unbind(1)
        )
        q, k = block.attn.q_norm(q), block.attn.k_norm(k)
        logits = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5 + size.log()
        attention = logits.softmax(dim=-1)
        taken = torch.einsum("hqk,khd->qhd", attention, v).flatten(1)
        tokens = tokens + block.ls1(block.attn.proj(block.attn.norm(taken)))
        keys = F.normalize(k.mean(dim=1), dim=-1)
        worth = torch.zeros(len(tokens)).double()
        if model.cls_token is not None:
            worth = (attention[:, 0].T * v.norm(dim=-1)).mean(dim=1)
            worth = IMPORTANCE_WEIGHT * (worth / worth[prefix:].mean()).log()
        asked = list(range(prefix, len(tokens), 2))
        joins = {}
        for asking in range(prefix + 1, len(tokens), 2):
            likeness = keys[asked] @ keys[asking]
            if likeness.max() - worth[asking] > model.thresholds[layer]:
                joins[asking] = asked[likeness.argmax()]
                depth[groups[asking]] = torch.minimum(
                    depth[groups[asking]], torch.tensor(layer + 1)
                )
        members = {
            place: [place, *(one for one, into in joins.items() if into == place)]
            for place in range(len(tokens))
        }
        kept = [place for place in range(len(tokens)) if place not in joins]
        tokens = torch.stack(
            [
                (size[members[place], None] * tokens[members[place]]).sum(0)
                / size[members[place]].sum()
                for place in kept
            ]
        )
        groups = [[first for one in members[place] for first in groups[one]] for place in kept]
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    whole = torch.empty(len(depth), tokens.shape[1]).double()
    for group, token in zip(groups, tokens, strict=True):
        whole[group] = token
    return model.forward_head(model.norm(whole[None]))[0], depth


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_does_what_a_loop_over_single_images_does(name):
    model = make(name)
    adaptive, images = adapted(model), photographs(model)
    logits, trace = adaptive.forward_with_trace(images)
    torch.testing.assert_close(adaptive(images), logits)
    for number, image in enumerate(images):
        expected, depth = one_image(adaptive, image)
        torch.testing.assert_close(logits[number], expected, rtol=1e-8, atol=1e-8)
        assert torch.equal(trace.depth[number], depth)
    assert not torch.allclose(logits, model(images))
    assert (trace.depth[:, : model.num_prefix_tokens] == 4).all() and (trace.depth < 4).any()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_thresholds_it_is_the_plain_model_bit_for_bit(name):
    model = make(name)
    assert torch.equal(without_thresholds(model)(photographs(model)), model(photographs(model)))
    assert torch.equal(adapted(model, 0.0)(photographs(model)), model(photographs(model)))


def test_thresholds_that_nobody_exceeds_change_nothing_but_rounding():
    model = make()
    adaptive = without_thresholds(model)
    adaptive.thresholds.fill_(1e6)
    torch.testing.assert_close(adaptive(photographs(model)), model(photographs(model)))


def test_an_image_does_not_depend_on_the_rest_of_the_batch():
    model = make()
    adaptive, images = adapted(model), photographs(model)
    together = adaptive(images)
    for number in range(len(images)):
        torch.testing.assert_close(adaptive(images[number : number + 1])[0], together[number])
        torch.testing.assert_close(
            adaptive(images.flip(0))[len(images) - 1 - number], together[number]
        )


def test_images_differ_in_what_is_saved():
    model = make()
    depth = adapted(model).forward_with_trace(photographs(model))[1].depth.float().mean(dim=1)
    assert depth.max() - depth.min() > 0.1


def test_a_higher_threshold_merges_fewer_in_the_first_layer_and_the_same_ones():
    model = make()
    adaptive, images, merged = adapted(model), photographs(model), []
    for threshold in torch.linspace(-1, 1.5, 12):
        adaptive.thresholds[0] = threshold
        merged.append(adaptive.forward_with_trace(images)[1].depth == 1)
    assert all((fewer <= more).all() for more, fewer in pairwise(merged))
    assert merged[0].any() and not merged[-1].all()


@pytest.mark.parametrize("saved", [0.1, 0.25, 0.4, 0.5])
def test_as_much_is_saved_as_was_wished_for(saved):
    model = make(depth=6, embed_dim=96)
    images = photographs(model, 32)
    adaptive = adapt(model, images, saved)
    done = flops_per_image(adaptive, adaptive.forward_with_trace(images)[1].depth)
    plain = flops_per_image(model, torch.full((1, model.patch_embed.num_patches + 1), 6))
    assert 1 - (done.mean() / plain).item() == pytest.approx(saved, abs=0.005)
    assert torch.allclose(
        plain, torch.tensor(counted_flops(model.eval(), images[:1])).double(), rtol=0.01
    )
    one = images[:1]  # alone, or the batch's longest image pads the comparison of keys
    assert counted_flops(adaptive, one) == pytest.approx(done[0].item(), rel=0.03)


def test_the_spread_moves_merges_to_later_layers_and_saves_as_much():
    model, means = make(depth=6, embed_dim=96), {}
    images = photographs(model, 32)
    for spread in (0.0, 1.0, 2.0):
        adaptive = without_thresholds(model)
        adaptive.spread = spread
        adaptive.calibrate(images, 0.3)
        depth = adaptive.forward_with_trace(images)[1].depth
        done = (
            flops_per_image(adaptive, depth).mean()
            / flops_per_image(model, torch.full_like(depth, 6)).mean()
        )
        assert 1 - done.item() == pytest.approx(0.3, abs=0.005)
        means[spread] = (
            (depth == 1).sum().item(),
            (depth == 5).sum().item(),
        )  # merged in the first layer, in the last
    assert (
        means[0.0][0] > means[1.0][0] > means[2.0][0]
        and means[0.0][1] < means[1.0][1] < means[2.0][1]
    )


def test_weights_and_thresholds_are_saved_and_loaded_together():
    model = make()
    adaptive = adapted(model)
    assert set(adaptive.state_dict()) == {*model.state_dict(), "thresholds", "importance_weight"}
    again = without_thresholds(make())
    again.load_state_dict(adaptive.state_dict())
    assert torch.equal(again(photographs(model)), adaptive(photographs(model)))


def test_it_is_turned_to_another_budget_and_the_original_stays_as_it_was():
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adaptive = adapted(model, 0.1)
    shallow = adaptive.forward_with_trace(photographs(model))[1].depth.float().mean()
    adaptive.train().calibrate(photographs(model), 0.3)
    assert (
        adaptive.training
        and adaptive.eval().forward_with_trace(photographs(model))[1].depth.float().mean() < shallow
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert isinstance(adaptive, VisionTransformer) and not isinstance(model, Adaptive)


def test_gradients_reach_every_weight():
    model = make()
    adaptive = adapted(model).train()
    adaptive(photographs(model)).square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in adaptive.parameters()
    )


BAD_MODELS = {
    "no VisionTransformer": lambda: timm.create_model("resnet10t"),
    "a way of its own": lambda: timm.create_model("avit_nano"),
    "adaptive already": lambda: adapted(make()),
    "not timm's plain ones": lambda: timm.create_model(
        "vit_tiny_patch16_224", depth=1, block_fn=lambda **_: torch.nn.Identity()
    ),
    "half precision": lambda: make().bfloat16(),
    "drops patches": lambda: make(patch_drop_rate=0.5),
}


@pytest.mark.parametrize("reason", BAD_MODELS)
def test_a_model_that_cannot_be_adapted_is_told_why(reason):
    with pytest.raises(UserError, match=reason) as error:
        adapt(BAD_MODELS[reason](), torch.zeros(4, 3, 96, 96), 0.3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "saved", "message"),
    [
        (lambda images: images[:0], 0.3, "0 images are too few"),
        (lambda images: images[:1], 0.3, "1 images are too few"),
        (
            lambda images: images[:, :1],
            0.3,
            r"images of shape \[6, 1, 96, 96\], the model wants \[B, 3, 96, 96\]",
        ),
        (lambda images: images[..., :80], 0.3, r"the model wants \[B, 3, 96, 96\]"),
        (lambda images: images / 0, 0.3, "no numbers"),
        (lambda images: images, -0.1, "between 0 and 0.8"),
        (lambda images: images, 0.9, "between 0 and 0.8"),
        (lambda images: images, 0.8, "out of reach"),
    ],
)
def test_a_bad_calibration_changes_nothing(change, saved, message):
    model = make()
    adaptive = adapted(model)
    before = adaptive.thresholds.clone()
    with pytest.raises(UserError, match=message) as error:
        adaptive.calibrate(change(photographs(model)), saved)
    assert "\n" not in str(error.value) and torch.equal(adaptive.thresholds, before)


def test_weights_that_are_no_numbers_are_told():
    model = make()
    model.blocks[0].mlp.fc1.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="weights that are no numbers"):
        adapt(model, photographs(model), 0.3)


def test_importance_changes_who_merges_and_not_how_much_is_saved():
    model = make(depth=6)
    images = photographs(model, 32)
    found = [adapt(model, images, 0.3, weight) for weight in (IMPORTANCE_WEIGHT, 0.0)]
    depths = [adaptive.forward_with_trace(images)[1].depth for adaptive in found]
    assert not torch.equal(*depths)
    saved = [flops_per_image(*pair).mean().item() for pair in zip(found, depths, strict=True)]
    assert saved[0] == pytest.approx(saved[1], rel=0.03)


def test_it_is_what_the_library_offers():
    assert avit_lib.adapt is adapt
