"""Where halting starts.

Calibrated: the depth that was wished for, on backbones whose channel 0 is spread very differently. Fitted: who is
redundant, what the fit changes and what it must not, and that training holds it.
"""

import pytest
import torch
from conftest import bright_and_dark, varied_model

from avit_lib.errors import UserError
from avit_lib.starts import (
    calibrated_beta,
    channel_parameters,
    fit_start,
    grid_rank,
    hold_channel,
    mean_depth,
    redundancy,
)

VARIANT = {"class_token_halts": False, "merge_halted": True}

# --- beta, calibrated -------------------------------------------------------------------------------------------------

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
    black = torch.zeros(1, 1, 28, 28, dtype=torch.float64)
    model.beta = calibrated_beta(model, black, model.gamma, model.eps, 3.5)
    assert mean_depth(model, black) == 4


@pytest.mark.parametrize("wish", [0.5, 1.0, 6.0, 7.0])
def test_a_wish_out_of_reach_is_refused(wish):
    with pytest.raises(UserError, match="between 1 and 6"):
        calibrated_beta(varied_model(), TWO_IMAGES, 5.0, 0.01, wish)


# --- channel 0, fitted ------------------------------------------------------------------------------------------------


def images():
    """Images [8, 1, 28, 28] of smooth and of busy regions."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64).repeat_interleave(7, 2)
    fine = torch.randn(8, 1, 28, 28, generator=generator, dtype=torch.float64)
    return coarse.repeat_interleave(7, 3) + fine * torch.linspace(0, 1.5, 28, dtype=torch.float64)


def fitted_model(target=(0.1, 0.2, 0.2, 0.2, 0.1, 0.2)):
    model = varied_model(name="avit_micro_patch4_28", **VARIANT, gamma=5.0)
    fit_start(model, images(), torch.tensor(target))
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


def test_ranks_thin_a_grid_out_evenly():
    rank = grid_rank(4, 4).view(4, 4)
    assert rank.tolist() == [[4, 0, 2, 0], [0, 1, 0, 1], [2, 0, 3, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize(("height", "width"), [(14, 14), (7, 7), (2, 1), (1, 5), (3, 8)])
def test_half_of_any_grid_is_left_out_first_and_one_position_is_left_at_last(height, width):
    rank = grid_rank(height, width)
    assert len(rank) == height * width
    assert (rank == 0).sum() == height * width // 2
    assert (rank == rank.max()).sum() == 1


def test_a_patch_is_as_redundant_as_its_best_stand_in():
    keys = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]])
    rank = torch.tensor([0, 1, 1, 2])
    active = torch.tensor([[True, True, True, True]])
    half = 0.5**0.5
    assert redundancy(keys, rank, active)[0].tolist() == pytest.approx([1.0, half, half, -torch.inf])
    active[0, 1] = False  # a token that is gone stands for nobody
    assert redundancy(keys, rank, active)[0, 0].item() == pytest.approx(half)


def test_as_many_tokens_halt_in_each_layer_as_wished_for():
    target = (0.1, 0.2, 0.2, 0.2, 0.1, 0.2)
    depth = fitted_model(target).forward_with_trace(images())[1].depth[:, 1:]
    halted = depth.flatten().bincount(minlength=7)[1:] / depth.numel()
    assert halted.tolist() == pytest.approx(target, abs=0.01)


def test_redundant_patches_halt_first_on_images_that_the_fit_never_saw():
    model = fitted_model((0.3, 0.2, 0.2, 0.1, 0.1, 0.1))
    new = images().flip(0, 2).roll(3, dims=3)
    tokens = model.blocks[0](model.embed(new))
    keys = model.blocks[1].attn.qkv(model.blocks[1].norm1(tokens)).chunk(3, dim=-1)[1][:, 1:]
    found = redundancy(keys, grid_rank(7, 7), torch.ones(8, 49, dtype=torch.bool))
    channel = tokens[:, 1:, 0]
    usable = found.isfinite()
    together = torch.stack([found[usable], channel[usable]])
    assert torch.corrcoef(together)[0, 1] > 0.4


def test_only_channel_0_changes():
    before = untouched(varied_model(name="avit_micro_patch4_28", **VARIANT))
    after = untouched(fitted_model())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_mode_of_the_model_is_kept():
    model = varied_model(name="avit_micro_patch4_28", **VARIANT).train()
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


@pytest.mark.parametrize("variant", [{}, {"merge_halted": True}, {"class_token_halts": False}])
def test_variants_without_merging_are_refused(variant):
    with pytest.raises(UserError, match="merge_halted=True"):
        fit_start(varied_model(**variant), bright_and_dark(), torch.full((6,), 1 / 6))


def test_a_held_channel_survives_training_and_the_rest_learns():
    model = fitted_model().train()
    hold_channel(model)
    held, before = channels(model), untouched(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    logits, trace = model.forward_with_trace(images())
    (logits.square().sum() + trace.ponder.sum()).backward()
    optimizer.step()
    assert all(map(torch.equal, held, channels(model)))
    after = untouched(model)
    assert not torch.equal(before["blocks.0.mlp.fc1.weight"], after["blocks.0.mlp.fc1.weight"])
    assert not torch.equal(before["blocks.0.mlp.fc2.weight"], after["blocks.0.mlp.fc2.weight"])
