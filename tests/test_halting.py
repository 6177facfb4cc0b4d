"""Algorithm 1 on bare scores: its invariants, an independent slow reference, its gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from avit_lib.halting import HaltingRule, executed_depth, halting_score, halting_step, initial_state

quick = settings(max_examples=60, deadline=None)


@st.composite
def scores_and_eps(draw):
    """Scores [L, B, N] in float64, all ones in the last layer, and an eps."""
    layers, images, tokens = (
        draw(st.integers(1, 6)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
    )
    highest = draw(st.sampled_from([0.2, 0.5, 1.0]))
    count = (layers - 1) * images * tokens
    values = draw(st.lists(st.floats(0, highest), min_size=count, max_size=count))
    scores = torch.ones(layers, images, tokens, dtype=torch.float64)
    scores[:-1] = torch.tensor(values, dtype=torch.float64).reshape(layers - 1, images, tokens)
    return scores, draw(st.sampled_from([0.01, 0.1, 0.25]))


def run(scores, eps):
    """All states after each layer, and the output weights [L, ...]."""
    state = initial_state(scores[0])
    states, weights = [], []
    for score in scores:
        state, weight = halting_step(state, score, eps)
        states.append(state)
        weights.append(weight)
    return states, torch.stack(weights)


def reference(scores, eps):
    """One token, one number at a time: (depth, remainder, ponder, weights)."""
    cumulative, remainder, ponder, depth, weights = 0.0, 1.0, 0.0, 0, []
    halted = False
    for score in scores:
        if halted:
            weights.append(0.0)
            continue
        depth += 1
        ponder += 1
        cumulative += score
        if cumulative >= 1 - eps:
            halted = True
            ponder += remainder
            weights.append(remainder)
        else:
            remainder -= score
            weights.append(score)
    return depth, remainder, ponder, weights


@quick
@given(scores_and_eps())
def test_invariants(case):
    scores, eps = case
    states, weights = run(scores, eps)
    last = states[-1]
    torch.testing.assert_close(weights.sum(0), torch.ones_like(weights[0]), rtol=0, atol=1e-12)
    assert (weights >= -1e-12).all()
    assert (last.depth >= 1).all() and (last.depth <= len(scores)).all()
    torch.testing.assert_close(last.ponder, last.depth + last.remainder, rtol=0, atol=1e-12)
    assert not last.active.any()


@quick
@given(scores_and_eps())
def test_a_token_halts_once_and_for_good(case):
    scores, eps = case
    states, _ = run(scores, eps)
    active = torch.stack(
        [torch.ones_like(states[0].active), *(state.active for state in states)]
    ).int()
    steps = active[1:] - active[:-1]
    assert (steps <= 0).all()
    assert (steps.sum(0) == -1).all()


@quick
@given(scores_and_eps())
def test_nothing_changes_after_halting(case):
    scores, eps = case
    states, weights = run(scores, eps)
    for before, after, weight in zip(states[:-1], states[1:], weights[1:], strict=True):
        halted = ~before.active
        for name in ("cumulative", "remainder", "ponder", "depth"):
            assert torch.equal(getattr(before, name)[halted], getattr(after, name)[halted])
        assert (weight[halted] == 0).all()


@quick
@given(scores_and_eps())
def test_equals_the_slow_reference(case):
    scores, eps = case
    states, weights = run(scores, eps)
    for image in range(scores.shape[1]):
        for token in range(scores.shape[2]):
            depth, remainder, ponder, expected = reference(scores[:, image, token].tolist(), eps)
            last = states[-1]
            assert last.depth[image, token] == depth
            assert last.remainder[image, token].item() == pytest.approx(remainder, abs=1e-12)
            assert last.ponder[image, token].item() == pytest.approx(ponder, abs=1e-12)
            assert weights[:, image, token].tolist() == pytest.approx(expected, abs=1e-12)


@quick
@given(scores_and_eps())
def test_the_layout_does_not_matter(case):
    scores, eps = case
    states, weights = run(scores, eps)
    flat_states, flat_weights = run(scores.flatten(1), eps)
    assert torch.equal(weights.flatten(1), flat_weights)
    for name in ("active", "cumulative", "remainder", "ponder", "depth"):
        assert torch.equal(getattr(states[-1], name).flatten(), getattr(flat_states[-1], name))


def test_a_worked_example():
    scores = torch.tensor(
        [[0.125, 0.25, 0.5, 0.5, 1.0]], dtype=torch.float64
    ).T  # one token, five layers
    states, weights = run(scores, eps=0.25)
    assert states[-1].depth.item() == 3  # 0.125 + 0.25 + 0.5 = 0.875 >= 0.75
    assert states[-1].remainder.item() == 0.625
    assert states[-1].ponder.item() == 3.625
    assert weights[:, 0].tolist() == [0.125, 0.25, 0.625, 0.0, 0.0]


def test_the_boundary_halts():
    at, below = torch.tensor([0.5, 0.25, 1.0]), torch.tensor([0.5, 0.25 - 2**-20, 1.0])
    states, _ = run(
        torch.stack([at, below], dim=1).double(), eps=0.25
    )  # 0.5 + 0.25 == 1 - 0.25, all exact
    assert states[1].active.tolist() == [False, True]
    assert states[-1].depth.tolist() == [2, 3]


def test_who_reaches_the_last_layer_halts_there_whatever_its_sum():
    scores = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64).T
    states, weights = run(scores, eps=0.01)
    assert states[-1].depth.item() == 4 and states[-1].ponder.item() == 5.0
    assert weights[:, 0].tolist() == [0.0, 0.0, 0.0, 1.0]


def test_gradient_of_ponder():
    generator = torch.Generator().manual_seed(3)
    eps = 0.05
    scores = torch.rand(6, 2, 8, generator=generator, dtype=torch.float64) * 0.6
    scores[-1] = 1.0
    states, _ = run(scores, eps)
    assert (
        torch.stack([state.cumulative for state in states]) - (1 - eps)
    ).abs().min() > 1e-4  # no token at its edge
    assert len(states[-1].depth.unique()) >= 3
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: run(s, eps)[0][-1].ponder, (scores,), eps=1e-7)
    run(scores, eps)[0][-1].ponder.sum().backward()
    layer = torch.arange(1, 7)[:, None, None]
    expected = torch.where(
        layer < states[-1].depth, -1.0, 0.0
    )  # rho = N + 1 - sum of h before the halting layer
    assert torch.equal(scores.grad, expected.double())


def test_score_is_the_sigmoid_of_channel_zero_only():
    tokens = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    score = halting_score(tokens, HaltingRule(gamma=5.0, beta=-10.0, eps=0.01))
    torch.testing.assert_close(score, 1 / (1 + torch.exp(-(5 * tokens[..., 0] - 10))))
    score.sum().backward()
    assert (tokens.grad[..., 0] > 0).all() and (tokens.grad[..., 1:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_score_of_half_precision_tokens_is_float32(dtype):
    assert (
        halting_score(torch.ones(1, 2, 3, dtype=dtype), HaltingRule(1.0, 0.0, 0.01)).dtype
        == torch.float32
    )


def test_executed_depth_ends_with_the_class_token():
    depth = torch.tensor([[2, 1, 4, 2], [4, 1, 3, 4]])
    assert executed_depth(depth).tolist() == [[2, 1, 2, 2], [4, 1, 3, 4]]
