"""Adaptive token halting (A-ViT, Algorithm 1) as pure functions on tensors, the paper's symbols
beside the lines.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HaltingRule:
    """When a token halts; the last two settings go past the paper."""

    gamma: float | Tensor  # scales channel 0 into a halting score
    beta: float | Tensor  # shifts it
    eps: float | Tensor  # a token halts when its scores add up to 1 - eps
    class_token_halts: bool = (
        True  # False: the class token runs to the last layer, and is the representation there
    )
    direction: Tensor | None = (
        None  # [D]; the score is read from it, a learned projection, in place of channel 0
    )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HaltingRule):
            return NotImplemented
        if self.direction is None or other.direction is None:
            alike = self.direction is other.direction
        else:
            alike = torch.equal(self.direction, other.direction)
        numbers = [
            (rule.gamma, rule.beta, rule.eps, rule.class_token_halts) for rule in (self, other)
        ]
        return alike and numbers[0] == numbers[1]


@dataclass(frozen=True)
class HaltingState:
    """What is known of every token between two layers; all fields share one shape, such as [B,
    N].
    """

    active: Tensor  # m: True while the token still computes
    cumulative: Tensor  # cumul: sum of its halting scores so far
    remainder: Tensor  # R: 1 - sum of its scores before the layer in which it halts
    ponder: Tensor  # rho: layers executed + remainder
    depth: Tensor  # N_k: layers executed


@dataclass(frozen=True)
class HaltingTrace:
    """How deep each token of a batch went: every token followed to its own halting."""

    depth: Tensor  # N_k [B, N], integer, 1..L
    ponder: Tensor  # rho [B, N]
    halting_scores: Tensor  # h [B, L, N], 0 once a token has halted
    output_weights: (
        Tensor  # w [B, L] of the class token: how much each layer counts in the representation
    )


def executed_depth(depth: Tensor) -> Tensor:
    """Layers [B, N] that plain inference computes of ``depth`` [B, N]: none after the class token
    has halted.
    """
    return torch.minimum(depth, depth[:, :1])


def halting_score(tokens: Tensor, rule: HaltingRule) -> Tensor:
    """Halting scores h [...] of tokens [..., D], at least in float32 (equation 3): no parameter is
    added.
    """
    channel = tokens[..., 0] if rule.direction is None else tokens @ rule.direction  # t_0
    channel = channel.to(torch.promote_types(tokens.dtype, torch.float32))
    return torch.sigmoid(rule.gamma * channel + rule.beta)  # h = sigmoid(gamma * t_0 + beta)


def initial_state(like: Tensor) -> HaltingState:
    """The state before layer 1, every token active; shape, dtype and device are those of
    ``like``.
    """
    zeros = torch.zeros_like(like)
    return HaltingState(
        active=torch.ones_like(like, dtype=torch.bool),  # m = 1
        cumulative=zeros,  # cumul = 0
        remainder=torch.ones_like(like),  # R = 1
        ponder=zeros,  # rho = 0
        depth=torch.zeros_like(like, dtype=torch.long),
    )


def halting_step(
    state: HaltingState, score: Tensor, eps: float | Tensor
) -> tuple[HaltingState, Tensor]:
    """One layer of Algorithm 1: from its scores to the next state and the output weight w of each
    token.

    ``score`` has the shape of the state and must be 1 in the last layer. A token halts once, in the
    first layer in which cumul >= 1 - eps; it then weighs R, before that h, afterwards 0 (the
    printed pseudo-code would add R again in later layers, the published code does not).
    """
    active = state.active
    score = torch.where(active, score, 0.0)  # h * m
    cumulative = state.cumulative + score  # cumul += h
    halts = active & (cumulative >= 1 - eps)
    continues = active & ~halts
    weight = torch.where(halts, state.remainder, score)  # w
    next_state = HaltingState(
        active=continues,  # m
        cumulative=cumulative,
        remainder=torch.where(continues, state.remainder - score, state.remainder),  # R -= h
        ponder=state.ponder
        + active
        + torch.where(halts, state.remainder, 0.0),  # rho += m, + R on halting
        depth=state.depth + active,  # N_k
    )
    return next_state, weight


def trace_of(halting_scores: Tensor, depth: Tensor) -> HaltingTrace:
    """The trace that follows from the scores [B, L, N] of all layers (0 once a token has halted)
    and depth [B, N].
    """
    layer = torch.arange(1, halting_scores.shape[1] + 1, device=depth.device)[:, None]
    before = torch.where(
        layer < depth[:, None], halting_scores, 0.0
    )  # h of the layers before the halting layer
    remainder = 1 - before.sum(dim=1)  # R
    halts = layer[:, 0] == depth[:, :1]
    weights = torch.where(halts, remainder[:, :1], before[:, :, 0])  # w of the class token
    return HaltingTrace(depth, depth + remainder, halting_scores, weights)  # rho = N_k + R
