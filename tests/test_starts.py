"""Where halting starts.

Calibrated: the depth that was wished for, on backbones whose channel 0 is spread very differently.
Fitted: who can be spared, what the fit changes and what it must not, and how fast it then learns.
"""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from conftest import bright_and_dark, channels, noise, refused, varied_model
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.optim import Lookahead
from torch.nn.utils import prune
from torch.testing import assert_close

from avit_lib import starts
from avit_lib.model import masked_block
from avit_lib.starts import (
    calibrate_beta,
    channel_parameters,
    fit_start,
    scale_channel_rate,
)

# --- beta, calibrated -----------------------------------------------------------------------------

TWO_IMAGES = bright_and_dark()[:2]


@pytest.mark.parametrize("gamma", [0.2, 10.0])
@pytest.mark.parametrize("wish", [1.5, 4.0, 5.7])
def test_the_mean_depth_is_the_one_wished_for(gamma, wish):
    model = varied_model(0.5, gamma=gamma).train()
    beta = calibrate_beta(model, TWO_IMAGES, wish)
    assert model.beta == -1.0 and model.training
    model.beta = beta
    _, trace = model.eval().forward_with_trace(TWO_IMAGES)
    assert trace.depth.double().mean() == pytest.approx(wish, abs=0.1)


def test_a_wish_out_of_reach_is_refused():
    with refused("between 1 and 6"):
        calibrate_beta(varied_model(), TWO_IMAGES, 6.1)


# --- channel 0, fitted ----------------------------------------------------------------------------

HALTING = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.1, 0.2])


def images():
    """Images [8, 3, 28, 28] of smooth and of busy regions."""
    return noise(8, 3, 28, 28, seed=5) * torch.linspace(0.1, 2, 28)


def untouched_model(gamma=5.0, **settings):
    model = varied_model(gamma=gamma, patch_size=4, embed_dim=64, **settings)
    with torch.no_grad():  # positions as if they had been learnt
        model.pos_embed[0, 1:, 1:] = build_sincos2d_pos_embed([7, 7], 64)[:, 1:]
    return model


def fitted_model(halting=HALTING, **settings):
    model = untouched_model(**settings)
    fit_start(model, images(), halting)
    return model


def share_halted(model):
    """Which part of the patches halts in each layer."""
    depth = model.forward_with_trace(images())[1].depth[:, 1:]
    return (depth.flatten().bincount(minlength=7)[1:] / depth.numel()).tolist()


def untouched(model):
    """All parameters with channel 0 blanked."""
    blank = deepcopy(model).requires_grad_(False)
    for parameter, index in channel_parameters(blank):
        parameter[index] = 0.0
    return list(blank.parameters())


def test_a_patch_is_as_important_as_what_the_class_token_takes_from_it():
    """Against the attention that the block computes."""
    model = untouched_model()
    block, tokens = model.blocks[1], model.embed(images())
    active = torch.ones(tokens.shape[:2], dtype=torch.bool)
    active[:, 5] = False
    block.attn.fused_attn, seen = False, []
    block.attn.attn_drop.register_forward_hook(lambda *parts: seen.append(parts[-1]))
    masked_block(block, tokens, active)
    # [B, heads, P] of the class token, among the patches
    attention = F.normalize(seen[0][:, :, 0, 1:], p=1, dim=-1)
    qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, block.attn.num_heads, -1))
    length = qkv[:, 1:, 2].norm(dim=-1).transpose(1, 2)
    found = starts.class_attention(block, tokens, active)
    assert_close(found, (attention * length).mean(dim=1))
    spared = starts.unimportance(block, tokens, active)
    assert spared.isfinite().all()
    assert_close(spared[:, 5:], -found[:, 5:].log())


@pytest.mark.parametrize("settings", [{}, {"init_values": 1e-5}])
def test_as_many_patches_halt_in_each_layer_as_wished_for_and_only_channel_0_changes(settings):
    before, model = untouched(untouched_model(**settings)), fitted_model(**settings)
    assert share_halted(model) == pytest.approx(HALTING.tolist(), abs=0.01)
    assert all(map(torch.equal, before, untouched(model)))
    fit_start(model.train(), images(), HALTING.flip(0))  # again, and its mode is kept
    assert model.training
    assert share_halted(model) == pytest.approx(HALTING.flip(0).tolist(), abs=0.01)


def test_patches_halt_first_that_can_be_spared_on_images_that_the_fit_never_saw():
    model = fitted_model(torch.tensor([0.3, 0.2, 0.2, 0.1, 0.1, 0.1]))
    new = images().flip(0, 2).roll(3, dims=3)
    tokens = model.blocks[0](model.embed(new))
    wish = starts.unimportance(model.blocks[1], tokens, torch.ones(8, 50, dtype=torch.bool))
    depth = model.forward_with_trace(new)[1].depth.double()
    assert torch.corrcoef(torch.stack([wish.flatten(), depth[:, 1:].flatten()]))[0, 1] < -0.3
    assert depth[:, 0].mean() > depth[:, 1:].mean() + 1  # the class token by its own score, late


def test_an_image_all_of_whose_patches_are_equal_gives_a_model_that_computes():
    model = untouched_model()
    fit_start(model, 0 * images()[:1], HALTING)
    assert model(images()).isfinite().all()


@pytest.mark.parametrize(
    "settings, halting, message",
    [
        ({"final_norm": False}, HALTING, "weights in all norms"),
        ({"gamma": 0.0}, HALTING, "a gamma above 0"),
        ({"eps": 1e-9}, HALTING, "an eps of 1e-7 or more"),
        ({"embed_norm_layer": torch.nn.LayerNorm}, HALTING, "no norm before the first layer"),
        ({"depth": 1}, HALTING, "two layers or more"),
        ({"img_size": 30}, HALTING, "images of the size that the model is made for"),
        ({"dynamic_img_size": True}, HALTING, "images of the size that the model is made for"),
        ({}, HALTING[1:], "for each of 6 layers, and leave the last a patch"),
        ({}, 2 * HALTING, "a share of the patches"),
        ({}, torch.eye(6)[0], "of each image; raise target_depth"),
    ],
)
def test_a_fit_that_would_miss_is_refused_before_anything_changes(settings, halting, message):
    model = untouched_model(**settings)
    before = deepcopy(model.state_dict())
    height = 20 if "dynamic_img_size" in settings else 28
    with refused(message):
        fit_start(model, images()[:, :, :height], halting)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_fit_in_half_precision_is_refused():
    with refused("takes single precision"):
        fit_start(untouched_model(), images().half(), HALTING)


def test_an_optimizer_that_would_not_hold_channel_0_is_refused():
    model = varied_model()
    optimizer = Lookahead(torch.optim.SGD(model.parameters()))
    with refused("Lookahead calls no hooks of its steps"):
        scale_channel_rate(model, optimizer, 0.0)


def test_weights_that_are_made_anew_in_every_step_are_refused():
    model = untouched_model()
    prune.identity(model.blocks[1].mlp.fc2, "weight")
    with refused("prune, weight_norm or an adapter"):
        fit_start(model, images(), HALTING)
    adapted = untouched_model()
    adapted.blocks[1].mlp.fc2.__class__ = type("LoRA", (torch.nn.Linear,), {})
    with refused("prune, weight_norm or an adapter"):
        fit_start(adapted, images(), HALTING)
    with refused("prune, weight_norm or an adapter"):
        scale_channel_rate(model, torch.optim.SGD(model.parameters()), 0.0)


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_channel_0_goes_as_far_as_its_rate_says_and_the_rest_as_ever(rate):
    def step(model, rate):
        found = torch.optim.Adam(model.parameters(), lr=1e-3)
        if rate < 1:
            for one in (0.5, 0.0, rate):  # the last call counts
                scale_channel_rate(model, found, one)
        logits, trace = model.train().forward_with_trace(images())
        (logits.square().sum() + trace.ponder.sum()).backward()
        found.step()
        return model

    before = channels(fitted_model())
    free, scaled = step(fitted_model(), 1.0), step(fitted_model(), rate)
    for old, far, near in zip(before, channels(free), channels(scaled), strict=True):
        assert_close(near - old, rate * (far - old))
    assert all(map(torch.equal, untouched(free), untouched(scaled)))
