"""Where halting starts.

Calibrated: the depth that was wished for, on backbones whose channel 0 is spread very differently.
Fitted: who can be spared, what the fit changes and what it must not, and how fast it then learns.
"""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from conftest import bright_and_dark, varied_model
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

from avit_lib import starts
from avit_lib.errors import UserError
from avit_lib.model import masked_block
from avit_lib.starts import (
    calibrated_beta,
    channel_parameters,
    fit_start,
    mean_depth,
    scale_channel_rate,
)

# --- beta, calibrated -----------------------------------------------------------------------------

TWO_IMAGES = bright_and_dark()[:2]


@pytest.mark.parametrize("gamma", [0.2, 2.0, 10.0])
@pytest.mark.parametrize("wish", [1.5, 4.0, 5.7])
def test_the_mean_depth_is_the_one_wished_for(gamma, wish):
    model = varied_model(0.5)
    beta = calibrated_beta(model, TWO_IMAGES, gamma, 0.01, wish)
    model.gamma, model.beta, model.eps = gamma, beta, 0.01
    assert mean_depth(model, TWO_IMAGES) == pytest.approx(wish, abs=0.1)


def test_the_model_is_left_as_it_was():
    model = varied_model(0.5).train()
    calibrated_beta(model, TWO_IMAGES, 5.0, 0.1, 4.0)
    assert (model.gamma, model.beta, model.eps) == (2.0, -1.0, 0.01) and model.training


def test_a_depth_that_is_jumped_over_gives_the_deeper_side():
    """A single image all of whose tokens halt together knows whole layers only."""
    model = varied_model(0.0)
    for block in model.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
    black = torch.zeros(1, 3, 28, 28, dtype=torch.float64)
    model.beta = calibrated_beta(model, black, model.gamma, model.eps, 3.5)
    assert mean_depth(model, black) == 4


@pytest.mark.parametrize("wish", [0.5, 1.0, 6.0, 7.0])
def test_a_wish_out_of_reach_is_refused(wish):
    with pytest.raises(UserError, match="between 1 and 6"):
        calibrated_beta(varied_model(), TWO_IMAGES, 5.0, 0.01, wish)


# --- channel 0, fitted ----------------------------------------------------------------------------

HALTING = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.1, 0.2])


def images():
    """Images [8, 3, 28, 28] of smooth and of busy regions."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64).repeat_interleave(
        7, 2
    )
    fine = torch.randn(8, 1, 28, 28, generator=generator, dtype=torch.float64)
    grey = coarse.repeat_interleave(7, 3) + fine * torch.linspace(0, 1.5, 28, dtype=torch.float64)
    return grey.expand(-1, 3, -1, -1)


def untouched_model(**settings):
    model = varied_model(gamma=5.0, patch_size=4, embed_dim=64, **settings)
    with torch.no_grad():  # positions as if they had been learnt
        model.pos_embed[0, 1:, 1:] = build_sincos2d_pos_embed([7, 7], 64)[:, 1:]
    if model.direction is not None:  # as if it had been trained
        torch.nn.init.normal_(model.direction)
    return model


def fitted_model(halting=HALTING, target=starts.unimportance, pixels=None, **settings):
    model = untouched_model(**settings)
    fit_start(model, images() if pixels is None else pixels, halting, target)
    return model


def channels(model):
    """All that writes or reads channel 0."""
    return [parameter[index].detach().clone() for parameter, index in channel_parameters(model)]


def untouched(model):
    """All parameters with channel 0 blanked."""
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, index in channel_parameters(model):
        found[names[id(parameter)]][index] = 0.0
    return found


def test_a_patch_is_as_important_as_what_the_class_token_takes_from_it():
    """Against the attention that the block computes."""
    model = untouched_model()
    block, tokens = model.blocks[1], model.embed(images())
    active = torch.ones(tokens.shape[:2], dtype=torch.bool)
    active[:, 5] = False
    block.attn.fused_attn, seen = False, []
    hook = block.attn.attn_drop.register_forward_hook(lambda *parts: seen.append(parts[-1]))
    masked_block(block, tokens, active)
    hook.remove()
    attention = F.normalize(
        seen[0][:, :, 0, 1:], p=1, dim=-1
    )  # [B, heads, P] of the class token, among the patches
    value = block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)[2][:, 1:]
    length = torch.stack(
        [part.norm(dim=-1) for part in value.chunk(block.attn.num_heads, dim=-1)], dim=1
    )
    found, spared = (
        target(block, tokens, active) for target in (starts.class_attention, starts.unimportance)
    )
    assert torch.allclose(found, (attention * length).mean(dim=1), atol=1e-12)
    left = active[:, 1:]
    assert torch.allclose(spared[left], -found[left].log()) and (found[:, 4] == 0).all()
    assert spared.isfinite().all() and (spared[:, 4] > 2 * spared[left].max()).all()


@pytest.mark.parametrize(
    "settings", [{}, {"class_token_halts": False}, {"init_values": 1e-5}, {"projection": True}]
)
def test_as_many_patches_halt_in_each_layer_as_wished_for(settings):
    model = fitted_model(**settings)
    depth = model.forward_with_trace(images())[1].depth[:, 1:]
    halted = depth.flatten().bincount(minlength=7)[1:] / depth.numel()
    assert halted.tolist() == pytest.approx(HALTING.tolist(), abs=0.01)


def test_a_target_of_ones_own():
    """The higher a patch lies in the image, the better it can be spared."""
    rank = torch.arange(49, 0, -1).double()
    model = fitted_model(target=lambda block, tokens, active: rank.expand(len(tokens), -1))
    depth = model.forward_with_trace(images())[1].depth[:, 1:].float()
    assert depth[:, :21].mean() < depth[:, 21:].mean() - 1


def test_patches_that_are_all_alike_halt_together():
    """Those of the upper half first, which can be spared."""
    upper = (torch.arange(49) < 21).double()
    model = fitted_model(target=lambda block, tokens, active: upper.expand(len(tokens), -1))
    depth = model.forward_with_trace(images())[1].depth[:, 1:]
    assert depth[:, :21].max() < depth[:, 21:].min()


def test_patches_halt_first_that_can_be_spared_on_images_that_the_fit_never_saw():
    model = fitted_model(torch.tensor([0.3, 0.2, 0.2, 0.1, 0.1, 0.1]))
    new = images().flip(0, 2).roll(3, dims=3)
    tokens = model.blocks[0](model.embed(new))
    everyone = torch.ones(8, 50, dtype=torch.bool)
    wish = starts.unimportance(model.blocks[1], tokens, everyone)
    together = torch.stack([wish.flatten(), tokens[:, 1:, 0].flatten()])
    assert torch.corrcoef(together)[0, 1] > 0.4


def test_the_class_token_halts_by_its_own_score_and_late():
    depth = fitted_model().forward_with_trace(images())[1].depth
    assert depth[:, 0].float().mean() > depth[:, 1:].float().mean() + 1


@pytest.mark.parametrize("settings", [{}, {"init_values": 1e-5}])
def test_only_channel_0_changes(settings):
    before, after = untouched(untouched_model(**settings)), untouched(fitted_model(**settings))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_mode_of_the_model_is_kept():
    model = untouched_model().train()
    fit_start(model, images(), torch.full((6,), 1 / 6))
    assert model.training


def test_masked_and_packed_agree_on_a_fitted_model():
    model = fitted_model()
    model.execution = "masked"
    expected, trace = model.forward_with_trace(images())
    model.execution = "packed"
    logits, packed_trace = model.forward_with_trace(images())
    assert torch.allclose(logits, expected, atol=1e-10)
    assert torch.equal(trace.depth, packed_trace.depth)
    assert trace.depth.unique().numel() > 3


@pytest.mark.parametrize(
    "pixels", [images()[:1], torch.zeros(2, 3, 28, 28, dtype=torch.float64)], ids=["one", "equal"]
)
def test_a_poor_choice_of_images_gives_a_model_that_computes(pixels):
    """A single image, or images all of whose patches are equal."""
    model = fitted_model(pixels=pixels)
    logits, trace = model.forward_with_trace(images())
    assert logits.isfinite().all() and all(
        parameter.isfinite().all() for parameter in model.parameters()
    )
    assert trace.depth.min() >= 1 and trace.depth.max() <= 6


def test_a_model_may_be_fitted_again():
    model = fitted_model()
    fit_start(model, images(), HALTING.flip(0))
    depth = model.forward_with_trace(images())[1].depth[:, 1:]
    halted = depth.flatten().bincount(minlength=7)[1:] / depth.numel()
    assert halted.tolist() == pytest.approx(HALTING.flip(0).tolist(), abs=0.01)


def test_halting_that_leaves_nobody_for_the_last_layer_is_refused():
    with pytest.raises(
        UserError, match="leaves no patch for the last layer; raise target_depth"
    ) as error:
        fit_start(untouched_model(), images(), torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0, 0.0]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings, halting, message",
    [
        ({"proj_bias": False}, HALTING, "takes learned positions, biases"),
        ({"final_norm": False}, HALTING, "and weights in all norms"),
        ({}, HALTING[1:], "given for 5 layers, the model has 6"),
    ],
)
def test_a_fit_that_would_miss_is_refused_before_anything_changes(settings, halting, message):
    model = untouched_model(**settings)
    before = deepcopy(model.state_dict())
    with pytest.raises(UserError, match=message):
        fit_start(model, images(), halting)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_channel_0_goes_as_far_as_its_rate_says_and_the_rest_as_ever(optimizer, rate):
    def step(model, adjust):
        found = optimizer(model.parameters(), lr=1e-3)
        adjust(model, found)
        logits, trace = model.train().forward_with_trace(images())
        (logits.square().sum() + trace.ponder.sum()).backward()
        found.step()
        return model

    before = channels(fitted_model())
    free = step(fitted_model(), lambda *_: None)
    scaled = step(fitted_model(), lambda model, found: scale_channel_rate(model, found, rate))
    for old, far, near in zip(before, channels(free), channels(scaled), strict=True):
        torch.testing.assert_close(near - old, rate * (far - old))
    assert all(map(torch.equal, untouched(free).values(), untouched(scaled).values()))
