"""Algorithm 1 on bare scores: an independent slow reference, values by hand."""

import pytest
import torch

from avit_lib.halting import HaltingRule, halting_score, halting_step, initial_state


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
    torch.testing.assert_close(states[-1].ponder, depth + remainder, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights.sum(0), torch.ones_like(weights[0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("scores", "eps", "depth", "ponder", "weights"),
    [
        # 0.125 + 0.25 + 0.5 = 0.875 >= 0.75
        ([0.125, 0.25, 0.5, 0.5, 1.0], 0.25, 3, 3.625, [0.125, 0.25, 0.625, 0.0, 0.0]),
        # the boundary halts: 0.5 + 0.25 = 1 - 0.25, all exact
        ([0.5, 0.25, 1.0], 0.25, 2, 2.5, [0.5, 0.5, 0.0]),
        # who reaches the last layer halts there
        ([0.0, 0.0, 0.0, 1.0], 0.01, 4, 5.0, [0.0, 0.0, 0.0, 1.0]),
    ],
)
def test_values_by_hand(scores, eps, depth, ponder, weights):
    states, found = run(torch.tensor(scores, dtype=torch.float64)[:, None], eps)
    assert states[-1].depth.item() == depth and states[-1].ponder.item() == ponder
    assert found[:, 0].tolist() == weights


def test_the_score_is_read_from_channel_0_in_single_precision():
    tokens, rule = torch.randn(2, 3, 5).half(), HaltingRule(gamma=5.0, beta=-10.0, eps=0.01)
    tokens[0, 0, 0] = 2.5
    score = halting_score(tokens, rule)
    assert score.dtype == torch.float32 and score[0, 0].item() == pytest.approx(0.92414, abs=1e-5)
