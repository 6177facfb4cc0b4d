"""Where halting starts: what gamma, beta and channel 0 are before any training.

With beta too low, epochs pass before anything halts; too high, and the first steps tear a trained backbone apart. So
either beta is calibrated to a depth of one's choice (``calibrated_beta``), or channel 0 is fitted (``fit_start``, not
in the paper): ridge regression on training images finds the weights with which it says, layer by layer, how redundant
each token is, that is how similar to another one that could stand for it. No parameter is added: channel 0 is freed of
what it meant to the backbone, and then kept for halting alone (``hold_channel``).
"""

from collections.abc import Iterator
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avit_lib.errors import UserError
from avit_lib.halting import halting_score, halting_step, initial_state
from avit_lib.merging import masked_block, merge_masked
from avit_lib.model import AViT

TOLERANCE = 0.05  # layers by which a calibrated depth may miss the wish
SPREAD = 0.5  # standard deviation over tokens that channel 0 is fitted to: with gamma 5, logits of a few units
RANK_WEIGHT = 0.25  # how much less channel 0 of a position starts with for each rank
RIDGE = 2.0  # in units of the mean square of the features: small weights, so that training moves no score far


@torch.inference_mode()
def mean_depth(model: AViT, images: Tensor) -> float:
    """Mean depth in layers over all tokens of images [B, C, H, W], every token to its own halting."""
    return model.forward_with_trace(images)[1].depth.float().mean().item()


def calibrated_beta(model: AViT, images: Tensor, gamma: float, eps: float, wish: float) -> float:
    """The beta, by bisection, with which ``model`` reaches a mean depth of ``wish`` layers on images [B, C, H, W].

    Stops within ``TOLERANCE`` of the wish, or where the depth jumps over it; the model is left as it is. Raises
    UserError unless the wish lies between the first layer and the last.
    """
    layers = len(model.blocks)
    if not 1 < wish < layers:
        raise UserError(f"a mean depth of {wish} is out of reach; choose one between 1 and {layers} layers")
    probe = deepcopy(model).eval()
    probe.gamma, probe.eps = gamma, eps

    def depth(beta: float) -> float:
        probe.beta = beta
        return mean_depth(probe, images)

    low, high = -1.0, 1.0  # the higher beta, the sooner tokens halt
    while depth(low) < wish:
        low *= 2
    while depth(high) > wish:
        high *= 2
    while high - low > 1e-4 * max(1.0, abs(low)):
        beta = (low + high) / 2
        found = depth(beta)
        if abs(found - wish) <= TOLERANCE:
            return beta
        low, high = (beta, high) if found > wish else (low, beta)
    return low  # on the deeper side of a jump: less is lost


def grid_rank(height: int, width: int) -> Tensor:
    """The rank [height * width] of each position of a grid: how often the grid can be thinned out and still hold it.

    Every other position is left out, first as on a chessboard, then by rows, and so on: those of high rank are few and
    lie evenly over the image. Of two tokens that could stand for each other, the higher rank stays.
    """
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    held, rank = torch.ones_like(row, dtype=torch.bool), torch.zeros_like(row)
    while held.sum() > 1:
        for parity in ((row + column) % 2, row % 2):
            held = held & (parity == 0)
            rank = rank + held
        row, column = row // 2, column // 2
    return rank.flatten()


def redundancy(keys: Tensor, rank: Tensor, active: Tensor) -> Tensor:
    """Cosine [B, P] of the keys [B, P, d] of each patch and the most similar active one of higher rank; none: -inf."""
    keys = F.normalize(keys, dim=-1)
    could_stand_for = active[:, None, :] & (rank[None, :] > rank[:, None])
    return (keys @ keys.transpose(1, 2)).masked_fill(~could_stand_for, -torch.inf).amax(dim=2)


def channel_parameters(model: AViT) -> Iterator[tuple[nn.Parameter, int | tuple]]:
    """Where channel 0 is written and, by the norms, read: parameters, each with the index of its part."""
    yield model.cls_token, (..., 0)
    yield model.pos_embed, (..., 0)
    layers = [model.patch_embed.proj, *(layer for block in model.blocks for layer in (block.attn.proj, block.mlp.fc2))]
    norms = [model.norm, *(norm for block in model.blocks for norm in (block.norm1, block.norm2))]
    yield from ((parameter, 0) for layer in layers for parameter in layer.parameters())
    yield from ((norm.weight, 0) for norm in norms)


def hold_channel(model: AViT) -> None:
    """Keep channel 0 as it was fitted, in training too; Adam would take it far away, as no task loss holds it back."""
    for parameter, index in channel_parameters(model):
        held = torch.zeros_like(parameter, dtype=torch.bool)
        held[index] = True
        parameter.register_hook(lambda gradient, held=held: gradient.masked_fill(held, 0.0))


@torch.no_grad()
def fit_start(model: AViT, images: Tensor, target: Tensor) -> None:
    """Fit channel 0 of ``model``, in place, so that on images [B, C, H, W] the most redundant patches halt first.

    ``target`` [L] says which part of all patches halts in which layer. Channel 0 starts as minus the rank of its
    position; each MLP (of a block without layer scale) adds what is missing to the redundancy in the keys of the next
    layer. Raises UserError unless halted tokens merge and the class token runs to the last layer.
    """
    rule, trains = model.rule, model.training
    if not rule.merge_halted or rule.class_token_halts:
        raise UserError("a fitted start wants merge_halted=True and class_token_halts=False; set them, or fitted=False")
    model.eval()
    for parameter, index in channel_parameters(model):
        parameter[index] = 0.0
    rank = grid_rank(*model.patch_embed.grid_size).to(images.device)
    model.pos_embed[0, 1:, 0] = -RANK_WEIGHT * rank
    tokens = model.embed(images)
    state = initial_state(halting_score(tokens, rule.gamma, rule.beta))
    size = torch.ones_like(state.cumulative)
    for block, following, share in zip(model.blocks[:-1], model.blocks[1:], target.tolist(), strict=False):
        active = state.active
        entered = []
        hook = block.mlp.fc2.register_forward_pre_hook(lambda _, inputs, entered=entered: entered.extend(inputs))
        tokens = masked_block(block, tokens * active[..., None], active, size)
        hook.remove()
        (hidden,) = entered  # of the MLP
        keys = following.attn.qkv(following.norm1(tokens)).chunk(3, dim=-1)[1]
        patches = F.pad(active[:, 1:], (1, 0))
        wish = redundancy(keys[:, 1:], rank, active[:, 1:])[active[:, 1:]]
        row = _ridge(hidden[patches], SPREAD * _standardised(wish) - tokens[..., 0][patches])
        tokens[..., 0] += hidden @ row
        # A token halts now if gamma * (t_0 + bias) + beta brings its sum to 1 - eps: who needs the least halts.
        missing = torch.logit(1 - rule.eps - state.cumulative[patches])
        needed = (missing - rule.beta) / rule.gamma - tokens[..., 0][patches]
        number = round(share * len(images) * len(rank))
        bias = needed.kthvalue(min(max(number, 1), len(needed))).values
        block.mlp.fc2.weight[0], block.mlp.fc2.bias[0] = row, bias
        tokens[..., 0] += bias
        score = F.pad(halting_score(tokens, rule.gamma, rule.beta)[:, 1:], (1, 0))
        state, _ = halting_step(state, score, rule.eps)
        tokens, size = merge_masked(tokens, size, active & ~state.active, state.active)
    model.train(trains)


def _standardised(values: Tensor) -> Tensor:
    """``values`` [K] with mean 0 and deviation 1; the lowest, and -inf, are brought up to the 2 % quantile."""
    found = values[values.isfinite()]
    values = values.clamp(min=found.kthvalue(len(found) // 50 + 1).values)
    return (values - values.mean()) / values.std()


def _ridge(features: Tensor, wish: Tensor) -> Tensor:
    """The weights [d] with which features [K, d] give ``wish`` [K] but for a constant, by ridge regression."""
    features = features - features.mean(dim=0)
    gram = (features.T @ features).double()
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + penalty, (features.T @ (wish - wish.mean())).double()).to(features.dtype)
