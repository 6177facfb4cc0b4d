"""The start of halting: the depth that was wished for, on backbones whose channel 0 is spread very differently."""

import pytest
import torch
from conftest import bright_and_dark, varied_model

from avit_lib.calibration import calibrated_beta, mean_depth
from avit_lib.config import StudyError


def images():
    return bright_and_dark()[:2]


@pytest.mark.parametrize("gamma", [0.2, 2.0, 10.0])
@pytest.mark.parametrize("wish", [1.5, 4.0, 5.7])
def test_the_mean_depth_is_the_one_wished_for(gamma, wish):
    model = varied_model(0.5)
    beta = calibrated_beta(model, images(), gamma, 0.01, wish)
    model.gamma, model.beta, model.eps = gamma, beta, 0.01
    assert mean_depth(model, images()) == pytest.approx(wish, abs=0.1)


def test_the_model_is_left_as_it_was():
    model = varied_model(0.5).train()
    calibrated_beta(model, images(), 5.0, 0.1, 4.0)
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
    with pytest.raises(StudyError, match="between 1 and 6"):
        calibrated_beta(varied_model(), images(), 5.0, 0.01, wish)
