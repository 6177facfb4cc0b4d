"""Algorithm 1 on bare scores: against sums over all layers, and by hand."""

import pytest
import torch
from torch.testing import assert_close

from avit_lib.halting import HaltingRule, fade, halting_score, halting_step, initial_state


def run(scores, eps):
    """All states after each layer, and the output weights [L, ...]."""
    state = initial_state(scores[0])
    states, weights = [], []
    for score in scores:
        state, weight = halting_step(state, score, eps)
        states.append(state)
        weights.append(weight)
    return states, torch.stack(weights)


@pytest.mark.parametrize("eps", [0.01, 0.25])
@pytest.mark.parametrize("highest", [0.2, 0.5, 1.0])
def test_equals_what_sums_over_the_layers_say(highest, eps):
    scores = highest * torch.rand(6, 1000, dtype=torch.float64)
    scores[-1] = 1.0  # whoever comes that far halts there
    states, weights = run(scores, eps)
    sums = scores.cumsum(dim=0)
    depth = 1 + (sums < 1 - eps).sum(dim=0)
    remainder = (1 - sums + scores).gather(0, depth[None] - 1)[0]
    layer = torch.arange(1, len(scores) + 1)[:, None]
    expected = torch.where(layer < depth, scores, (layer == depth) * remainder)
    assert torch.equal(states[-1].depth, depth)
    assert torch.equal(torch.stack([state.active for state in states]), layer < depth)
    assert_close(states[-1].ponder, depth + remainder)
    assert_close(weights, expected)


def test_a_sum_on_the_boundary_halts():
    scores = torch.tensor([[0.5], [0.25], [1.0]])  # 0.5 + 0.25 = 1 - 0.25, all exact
    states, weights = run(scores, eps=0.25)
    assert states[-1].depth.item() == 2 and states[-1].ponder.item() == 2.5
    assert weights[:, 0].tolist() == [0.5, 0.5, 0.0]


def test_the_score_is_read_from_channel_0_in_single_precision():
    tokens, rule = torch.randn(2, 3, 5).half(), HaltingRule(gamma=5.0, beta=-10.0, eps=0.01)
    tokens[0, 0, 0] = 2.5
    score = halting_score(tokens, rule)
    assert score.dtype == torch.float32 and score[0, 0].item() == pytest.approx(0.92414, abs=1e-5)


def test_a_token_fades_in_its_gradient_alone():
    cumulative = torch.tensor([0.0, 0.3], requires_grad=True)
    bias = fade(cumulative, HaltingRule(1.0, 0.0, 0.01, task_gradient=2.0))
    assert bias.tolist() == [0.0, 0.0]
    assert torch.autograd.grad(bias.sum(), cumulative)[0].tolist() == [-2.0, -2.0]
