"""Adaptive token halting (A-ViT, Algorithm 1) as pure functions, with the paper's symbols."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HaltingRule:
    """When a token halts: three fixed numbers, and no parameter is added."""

    gamma: float | Tensor  # scales channel 0 into a halting score
    beta: float | Tensor  # shifts it
    eps: float | Tensor  # a token halts when its scores add up to 1 - eps
    task_gradient: float = 0.0  # strength of ``fade``; 0: as published


@dataclass(frozen=True)
class HaltingState:
    """What is known of every token between two layers; all fields have one shape, say [B, N]."""

    active: Tensor  # m: True while the token still computes
    cumulative: Tensor  # cumul: sum of its halting scores so far
    ponder: Tensor  # rho: layers executed, and the remainder R once it has halted
    depth: Tensor  # N_k: layers executed


@dataclass(frozen=True)
class HaltingTrace:
    """How deep each token of a batch went: every token followed to its own halting."""

    depth: Tensor  # N_k [B, N], integer, 1..L
    ponder: Tensor  # rho [B, N]: layers executed + remainder
    halting_scores: Tensor  # h [B, L, N], 0 once a token has halted
    output_weights: Tensor  # w [B, L] of the class token: how much each layer counts


def executed_depth(depth: Tensor) -> Tensor:
    """Layers [B, N] that plain inference computes of tokens that halt at ``depth`` [B, N].

    None after the class token, token 0, has halted: the logits can no longer change.
    """
    return torch.minimum(depth, depth[:, :1])


def halting_score(tokens: Tensor, rule: HaltingRule, last: bool = False) -> Tensor:
    """Halting scores h [...] of tokens [..., D], at least in float32 (equation 3).

    In the ``last`` layer all are 1: whoever comes that far halts there.
    """
    channel = tokens[..., 0]  # t_0
    channel = channel.to(torch.promote_types(channel.dtype, torch.float32))
    if last:
        return torch.ones_like(channel)
    return torch.sigmoid(rule.gamma * channel + rule.beta)  # h = sigmoid(gamma * t_0 + beta)


def decide(cumulative: Tensor, score: Tensor, eps: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the tokens that compute halt in a layer: their new sums, who halts, and weights w.

    All of one shape. A token halts in the first layer in which cumul >= 1 - eps; it then weighs
    what is left to 1, before that h.
    """
    remainder = 1 - cumulative  # R
    cumulative = cumulative + score  # cumul += h
    halts = cumulative >= 1 - eps
    return cumulative, halts, torch.where(halts, remainder, score)  # w


def fade(cumulative: Tensor, rule: HaltingRule) -> Tensor:
    """A bias on the attention logits of keys: 0, but with a gradient (ours).

    To halt is a hard decision, so in A-ViT the task has no say in when a patch halts. With the
    gradient of a token that fades while its scores add up, it has; what is computed stays the same.
    """
    left = rule.task_gradient * (1 - cumulative)
    return left - left.detach()


def channel_to_halt(cumulative: Tensor, rule: HaltingRule) -> Tensor:
    """The least channel 0 with which tokens of the sums ``cumulative`` halt in this layer."""
    return (torch.logit(1 - rule.eps - cumulative) - rule.beta) / rule.gamma


def initial_state(like: Tensor) -> HaltingState:
    """The state before layer 1, every token active, in shape, dtype and device ``like`` that."""
    return HaltingState(
        active=torch.ones_like(like, dtype=torch.bool),  # m = 1
        cumulative=torch.zeros_like(like),  # cumul = 0
        ponder=torch.zeros_like(like),  # rho = 0
        depth=torch.zeros_like(like, dtype=torch.long),
    )


def halting_step(
    state: HaltingState, score: Tensor, eps: float | Tensor
) -> tuple[HaltingState, Tensor]:
    """One layer of Algorithm 1 on all tokens: the next state, and the output weight w of each.

    ``score`` has the shape of the state and must be 1 in the last layer. A token halts once;
    afterwards it weighs 0 (the printed pseudo-code would add R again in later layers, the
    published code does not).
    """
    active = state.active
    cumulative, halts, weight = decide(
        state.cumulative,
        torch.where(active, score, 0.0),  # h * m
        eps,
    )
    weight = torch.where(active, weight, 0.0)
    next_state = HaltingState(
        active=active & ~halts,  # m
        cumulative=cumulative,
        ponder=state.ponder + active + torch.where(halts, weight, 0.0),  # rho += m, + R on halting
        depth=state.depth + active,  # N_k
    )
    return next_state, weight
