"""Tokens that merge by thresholds: against a loop over single images, and for bad input."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from avit_lib.adaptive import Adaptive, adapt, without_thresholds
from avit_lib.errors import UserError
from avit_lib.flops import counted_flops, flops_of, plain_flops
from avit_lib.merging import IMPORTANCE_WEIGHT

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


def make(name="vit_tiny_patch16_224", **settings) -> VisionTransformer:
    torch.manual_seed(0)
    model = timm.create_model(name, **(SMALL | ARCHITECTURES[name] | settings)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # tokens are all alike at the initialisation
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def photographs(model, number=6) -> torch.Tensor:
    """Smooth on one side, busy on the other, each more than the one before."""
    height, width = model.patch_embed.img_size
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(number, 3, height, width, generator=generator, dtype=torch.float64)
    return noise * torch.linspace(0, 2, width) * torch.linspace(0.2, 1, number)[:, None, None, None]


def adapted(model, saved=0.2) -> Adaptive:
    return adapt(model, photographs(model), saved)


def one_image(model: Adaptive, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and depth of an image by a plain loop over groups of places, nothing packed."""
    prefix, tokens = model.num_prefix_tokens, model.embed(image[None])[0]
    groups = [[place] for place in range(len(tokens))]
    depth = torch.full((len(tokens),), len(model.blocks))
    for layer, block in enumerate(model.blocks):
        size = torch.tensor([float(len(group)) for group in groups]).double()
        qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, block.attn.num_heads, -1))
        q, k, v = qkv.unbind(1)
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
                depth[groups[asking]] = depth[groups[asking]].clamp(max=layer + 1)
        kept = [place for place in range(len(tokens)) if place not in joins]
        means, joined = [], []
        for place in kept:
            members = [place, *(one for one, into in joins.items() if into == place)]
            means.append((size[members, None] * tokens[members]).sum(0) / size[members].sum())
            joined.append([first for one in members for first in groups[one]])
        tokens, groups = torch.stack(means), joined
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
    assert torch.equal(without_thresholds(model)(images), model(images))  # bit for bit
    assert torch.equal(adapted(model, 0.0)(images), model(images))


def test_an_image_does_not_depend_on_the_rest_of_the_batch():
    model = make()
    adaptive, images = adapted(model), photographs(model)
    together = adaptive(images)
    for number in range(len(images)):
        torch.testing.assert_close(adaptive(images[number : number + 1])[0], together[number])
    torch.testing.assert_close(adaptive(images.flip(0)).flip(0), together)
    depth = adaptive.forward_with_trace(images)[1].depth.float().mean(dim=1)
    assert depth.max() - depth.min() > 0.1  # nor do all save alike


def test_as_much_is_saved_as_was_wished_for():
    model = make(depth=6, embed_dim=96)
    images, depths = photographs(model, 32), []
    plain = plain_flops(model, model.patch_embed.num_patches + 1)
    for saved, spread, weight in (
        (0.1, 1.0, 0.2),
        (0.5, 0.0, 0.2),
        (0.5, 2.0, 0.2),
        (0.5, 2.0, 0.0),
    ):
        adaptive = without_thresholds(model, weight)
        adaptive.spread = spread
        adaptive.calibrate(images, saved)
        trace = adaptive.forward_with_trace(images)[1]
        flops = flops_of(adaptive, trace)
        assert 1 - flops.mean().item() / plain == pytest.approx(saved, abs=0.005)
        # One alone, or the batch's longest image pads the comparison of keys.
        assert counted_flops(adaptive, images[:1]) == pytest.approx(flops[0].item(), rel=0.03)
        depths.append(trace.depth)
    _, early, late, alike = depths
    assert (early == 1).sum() > (late == 1).sum() and (early == 5).sum() < (late == 5).sum()
    assert not torch.equal(late, alike)


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
    adaptive, images = adapted(model, 0.1), photographs(model)
    shallow = adaptive.forward_with_trace(images)[1].depth.float().mean()
    adaptive.train().calibrate(images, 0.3)
    assert adaptive.training
    assert adaptive.eval().forward_with_trace(images)[1].depth.float().mean() < shallow
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    adaptive.train()(images).square().sum().backward()
    assert all(weights.grad.isfinite().all() for weights in adaptive.parameters())


def with_nan():
    model = make()
    model.blocks[0].mlp.fc1.weight.data[0, 0] = torch.nan
    return model


BAD_MODELS = {
    "ResNet cannot be adapted: it is no plain": lambda: timm.create_model("resnet10t"),
    "AViT cannot be adapted: it is no plain": lambda: timm.create_model("avit_nano"),
    "Adaptive cannot be adapted: it is no plain": lambda: adapted(make()),
    "half precision": lambda: make().bfloat16(),
    "drops patches": lambda: make(patch_drop_rate=0.5),
    "weights that are no numbers": with_nan,
}


@pytest.mark.parametrize("reason", BAD_MODELS)
def test_a_model_that_cannot_be_adapted_is_told_why(reason):
    with pytest.raises(UserError, match=rf"\A[^\n]*{reason}[^\n]*\Z"):
        adapt(BAD_MODELS[reason](), torch.zeros(4, 3, 96, 96), 0.3)


@pytest.mark.parametrize(
    ("change", "saved", "error", "message"),
    [
        (lambda images: images[:1], 0.3, UserError, "1 images are too few"),
        (lambda images: images[..., :80], 0.3, AssertionError, "80.*96"),
        (lambda images: images / 0, 0.3, UserError, "no numbers"),
        (list, 0.2, UserError, "one tensor of floats"),
        (torch.Tensor.byte, 0.2, UserError, "one tensor of floats"),
        (lambda images: images, -0.1, UserError, "between 0 and 0.8"),
        (lambda images: images, 0.9, UserError, "between 0 and 0.8"),
        (lambda images: images, 0.8, UserError, "out of reach"),
    ],
)
def test_a_bad_calibration_changes_nothing(change, saved, error, message):
    model = make()
    adaptive = adapted(model)
    before = adaptive.thresholds.clone()
    with pytest.raises(error, match=rf"\A[^\n]*{message}[^\n]*\Z"):
        adaptive.calibrate(change(photographs(model)), saved)
    assert torch.equal(adaptive.thresholds, before)


def test_an_interrupted_calibration_changes_nothing():
    adaptive = adapted(make())
    before = adaptive.thresholds.clone()

    def interrupt(share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adaptive.calibrate(photographs(adaptive), 0.1, report=interrupt)
    assert torch.equal(adaptive.thresholds, before)
