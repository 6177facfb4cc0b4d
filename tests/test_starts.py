"""Where halting starts.

Calibrated: the depth that was wished for, on backbones whose channel 0 is spread very differently. Fitted: who can be
spared, what the fit changes and what it must not, and how fast it then learns.
"""

import pytest
import torch
from conftest import bright_and_dark, varied_model

from avit_lib import starts
from avit_lib.errors import UserError
from avit_lib.starts import calibrated_beta, channel_parameters, fit_start, mean_depth, scale_channel_rate

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

HALTING = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.1, 0.2])


def images():
    """Images [8, 1, 28, 28] of smooth and of busy regions."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64).repeat_interleave(7, 2)
    fine = torch.randn(8, 1, 28, 28, generator=generator, dtype=torch.float64)
    return coarse.repeat_interleave(7, 3) + fine * torch.linspace(0, 1.5, 28, dtype=torch.float64)


def untouched_model(**settings):
    return varied_model(name="avit_micro_patch4_28", gamma=5.0, **settings)


def fitted_model(halting=HALTING, target=starts.both, pixels=None, **settings):
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


def seen(keys, rank, active=None, query=None, values=None):
    """What a target sees, of a single head."""
    active = torch.ones(keys.shape[:2], dtype=torch.bool) if active is None else active
    query = torch.ones(len(keys), 1, keys.shape[-1]) if query is None else query[:, None]
    values = torch.ones_like(keys) if values is None else values
    return starts.Seen(query, keys[:, :, None], values[:, :, None], active, torch.tensor(rank))


@pytest.mark.parametrize(("height", "width"), [(14, 14), (7, 7), (2, 1), (1, 5), (3, 8)])
def test_ranks_tell_all_positions_apart_and_the_highest_lie_far_from_each_other(height, width):
    rank = starts.spread_rank(height, width)
    assert sorted(rank.tolist()) == list(range(1, height * width + 1))
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    highest = places[rank > 0.75 * len(rank)]
    if len(highest) > 4:
        assert torch.pdist(highest).min() > 1  # no two of them are neighbours


def test_a_patch_is_as_redundant_as_its_best_stand_in():
    keys = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]])
    half = 0.5**0.5
    found = starts.redundancy(seen(keys, [0, 1, 1, 2]))
    assert found[0].tolist() == pytest.approx([1.0, half, half, -torch.inf])
    gone = torch.tensor([[True, False, True, True]])  # a token that is gone stands for nobody
    assert starts.redundancy(seen(keys, [0, 1, 1, 2], gone))[0, 0].item() == pytest.approx(half)


def test_a_patch_is_as_important_as_what_the_class_token_takes_from_it():
    keys, values = torch.tensor([[[2.0], [0.0], [2.0]]]), torch.tensor([[[1.0], [1.0], [3.0]]])
    found = starts.unimportance(seen(keys, [1, 2, 3], query=torch.tensor([[1.0]]), values=values))[0]
    attention = torch.tensor([2.0, 0.0, 2.0]).softmax(0)
    assert found.tolist() == pytest.approx((-(attention * torch.tensor([1.0, 1.0, 3.0])).log()).tolist())
    active = torch.tensor([[True, True, False]])
    attention = torch.tensor([2.0, 0.0]).softmax(0)
    found = starts.unimportance(seen(keys, [1, 2, 3], active, torch.tensor([[1.0]]), values))[0]
    assert found.tolist() == pytest.approx([*(-attention.log()).tolist(), torch.inf])


@pytest.mark.parametrize("target", starts.TARGETS.values(), ids=starts.TARGETS)
@pytest.mark.parametrize("class_token_halts", [True, False])
def test_as_many_patches_halt_in_each_layer_as_wished_for(target, class_token_halts):
    model = fitted_model(target=target, class_token_halts=class_token_halts)
    depth = model.forward_with_trace(images())[1].depth[:, 1:]
    halted = depth.flatten().bincount(minlength=7)[1:] / depth.numel()
    assert halted.tolist() == pytest.approx(HALTING.tolist(), abs=0.01)


def test_a_target_of_ones_own():
    """Who lies in the upper half of the image can be spared."""
    model = fitted_model(target=lambda seen: seen.rank.new_tensor([1.0] * 21 + [0.0] * 28).expand_as(seen.active) * 1.0)
    depth = model.forward_with_trace(images())[1].depth[:, 1:].float()
    assert depth[:, :21].mean() < depth[:, 21:].mean() - 1


def test_patches_halt_first_that_can_be_spared_on_images_that_the_fit_never_saw():
    model = fitted_model(torch.tensor([0.3, 0.2, 0.2, 0.1, 0.1, 0.1]))
    new = images().flip(0, 2).roll(3, dims=3)
    tokens = model.blocks[0](model.embed(new))
    everyone = torch.ones(8, 50, dtype=torch.bool)
    wish = starts.both(starts._seen(model.blocks[1], tokens, everyone, starts.spread_rank(7, 7)))
    together = torch.stack([wish.flatten(), tokens[:, 1:, 0].flatten()])
    assert torch.corrcoef(together)[0, 1] > 0.4


def test_the_class_token_halts_by_its_own_score_and_late():
    depth = fitted_model().forward_with_trace(images())[1].depth
    assert depth[:, 0].float().mean() > depth[:, 1:].float().mean() + 1


def test_only_channel_0_changes():
    before, after = untouched(untouched_model()), untouched(fitted_model())
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


@pytest.mark.parametrize("target", starts.TARGETS.values(), ids=starts.TARGETS)
@pytest.mark.parametrize("pixels", [images()[:1], torch.zeros(2, 1, 28, 28, dtype=torch.float64)], ids=["one", "equal"])
def test_a_poor_choice_of_images_gives_a_model_that_computes(target, pixels):
    """A single image, or images all of whose patches are equal."""
    model = fitted_model(target=target, pixels=pixels)
    logits, trace = model.forward_with_trace(images())
    assert logits.isfinite().all() and all(parameter.isfinite().all() for parameter in model.parameters())
    assert trace.depth.min() >= 1 and trace.depth.max() <= 6


def test_a_model_may_be_fitted_again():
    model = fitted_model()
    fit_start(model, images(), HALTING.flip(0))
    depth = model.forward_with_trace(images())[1].depth[:, 1:]
    halted = depth.flatten().bincount(minlength=7)[1:] / depth.numel()
    assert halted.tolist() == pytest.approx(HALTING.flip(0).tolist(), abs=0.01)


def test_halting_that_leaves_nobody_for_the_last_layer_is_refused():
    with pytest.raises(UserError, match="leaves no patch for the last layer; raise target_depth") as error:
        fit_start(untouched_model(), images(), torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0, 0.0]))
    assert "\n" not in str(error.value)


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
