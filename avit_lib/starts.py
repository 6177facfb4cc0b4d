"""Where halting starts: what gamma, beta and channel 0 are before any training.

With beta too low, epochs pass before anything halts; too high, and the first steps tear a trained backbone apart. So
beta is calibrated to a depth of one's choice (``calibrated_beta``). But channel 0 of a trained backbone is arbitrary,
and so are the tokens that halt first. ``fit_start`` (not in the paper) writes into it, in closed form, what the
backbone knows of its tokens already: ridge regression on training images finds the weights with which channel 0 says,
layer by layer, how well each patch can be spared. A ``Target`` defines that: how little the class token attends to it
(``unimportance``), how similar it is to another one that stays (``redundancy``), both, or a function of your own. No
parameter is added: channel 0 is freed of what it meant to the backbone, and learns at a rate of its own
(``scale_channel_rate``).
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avit_lib.errors import UserError
from avit_lib.halting import halting_score, halting_step, initial_state
from avit_lib.model import AViT, masked_block

TOLERANCE = 0.05  # layers by which a calibrated depth may miss the wish
SPREAD = 0.7  # standard deviation over patches that channel 0 is fitted to: with gamma 5, logits of several units
LEAD = 2.0  # how much lower channel 0 of the class token starts: it halts by its own score, but late
REDUNDANCY_WEIGHT = 0.4  # beside 1 for unimportance
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


# --- which patches can be spared --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a target judges by: the attention of the layer that comes next, in evaluation mode."""

    query: Tensor  # [B, heads, d] of the class token
    keys: Tensor  # [B, P, heads, d] of the patches
    values: Tensor  # [B, P, heads, d]
    active: Tensor  # [B, P] bool: patches that have not halted
    rank: Tensor  # [P] of each position: of two patches that could stand for each other, the higher rank stays


Target = Callable[[Seen], Tensor]  # how well each patch can be spared, [B, P]; higher halts sooner


def unimportance(seen: Seen) -> Tensor:
    """Minus the logarithm [B, P] of what the class token takes from each patch: attention times norm of the value."""
    logits = torch.einsum("bhd,bphd->bph", seen.query, seen.keys) / seen.query.shape[-1] ** 0.5
    attention = logits.masked_fill(~seen.active[..., None], -torch.inf).softmax(dim=1)
    return -(attention * seen.values.norm(dim=-1)).mean(dim=2).log()


def redundancy(seen: Seen) -> Tensor:
    """Cosine [B, P] of the keys of each patch and the most similar active one of higher rank; none: -inf."""
    keys = F.normalize(seen.keys.flatten(2), dim=-1)
    could_stand_for = seen.active[:, None, :] & (seen.rank[None, :] > seen.rank[:, None])
    return (keys @ keys.transpose(1, 2)).masked_fill(~could_stand_for, -torch.inf).amax(dim=2)


def both(seen: Seen) -> Tensor:
    """Unimportance and redundancy [B, P], standardised over the active patches and added."""
    terms = [standardised(term(seen), seen.active) for term in (unimportance, redundancy)]
    return terms[0] + REDUNDANCY_WEIGHT * terms[1]


TARGETS: dict[str, Target] = {"unimportance": unimportance, "redundancy": redundancy, "both": both}


def spread_rank(height: int, width: int) -> Tensor:
    """A rank [height * width] of the positions of a grid, such that those above any rank lie evenly, in no lattice.

    By best candidates (Mitchell 1991): from the highest rank down, each is the farthest of some random positions from
    all that have one.
    """
    generator = torch.Generator().manual_seed(0)
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double()
    rank, distance = torch.zeros(len(places), dtype=torch.long), torch.full((len(places),), torch.inf)
    for number in range(len(places), 0, -1):
        free = (distance > 0).nonzero()[:, 0]
        candidates = free[torch.randperm(len(free), generator=generator)[:10]]
        best = candidates[distance[candidates].argmax()]
        rank[best] = number
        distance = distance.minimum((places - places[best]).norm(dim=1))
    return rank


def standardised(values: Tensor, active: Tensor) -> Tensor:
    """``values`` with mean 0 and deviation 1 over those ``active``; the lowest are brought up to the 2 % quantile."""
    finite = values[active & values.isfinite()]
    if not len(finite):
        return torch.zeros_like(values)
    values = values.clamp(finite.kthvalue(len(finite) // 50 + 1).values, finite.max())
    chosen = values[active]
    return (values - chosen.mean()) / chosen.std(correction=0).clamp(min=1e-6)


# --- channel 0, fitted ------------------------------------------------------------------------------------------------


def channel_parameters(model: AViT) -> Iterator[tuple[nn.Parameter, int | tuple]]:
    """Where channel 0 is written and, by the norms, read: parameters, each with the index of its part."""
    yield model.cls_token, (..., 0)
    yield model.pos_embed, (..., 0)
    layers = [model.patch_embed.proj, *(layer for block in model.blocks for layer in (block.attn.proj, block.mlp.fc2))]
    norms = [model.norm, *(norm for block in model.blocks for norm in (block.norm1, block.norm2))]
    yield from ((parameter, 0) for layer in layers for parameter in layer.parameters())
    yield from ((norm.weight, 0) for norm in norms)


def scale_channel_rate(model: AViT, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let channel 0 learn ``rate`` times as fast as all else; 0 holds it as it is.

    Steps are scaled, not gradients: Adam would undo that.
    """
    parts, before = list(channel_parameters(model)), []

    def remember(*_) -> None:
        before[:] = [parameter[index].detach().clone() for parameter, index in parts]

    @torch.no_grad()
    def scale(*_) -> None:
        for (parameter, index), old in zip(parts, before, strict=True):
            parameter[index] = torch.lerp(old, parameter[index], rate)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(scale)


@torch.no_grad()
def fit_start(model: AViT, images: Tensor, halting: Tensor, target: Target = both) -> None:
    """Fit channel 0 of ``model``, in place, so that on images [B, C, H, W] the patches halt first that can be spared.

    ``halting`` [L] says which part of all patches halts in which layer, the paper's target distribution say. Channel 0
    starts, of each position, as the mean of ``target`` there; each MLP (of a block without layer scale) adds what is
    missing to the target in the attention of the next layer. Raises UserError when less than a patch of an image is
    left for the last layer.
    """
    rule, trains = model.rule, model.training
    rank = spread_rank(*model.patch_embed.grid_size).to(images.device)
    if halting[-1] * len(rank) < 1:
        raise UserError("halting by this target leaves no patch for the last layer; raise target_depth or target_std")
    model.eval()
    for parameter, index in channel_parameters(model):
        parameter[index] = 0.0
    model.cls_token[..., 0] = -LEAD
    everyone = torch.ones(images.shape[0], len(rank) + 1, dtype=torch.bool, device=images.device)
    first = masked_block(model.blocks[0], model.embed(images), everyone)
    wish = SPREAD * standardised(target(_seen(model.blocks[1], first, everyone, rank)), everyone[:, 1:])
    model.pos_embed[0, 1:, 0] = wish.mean(dim=0)
    tokens = model.embed(images)
    state = initial_state(halting_score(tokens, rule))
    for block, following, share in zip(model.blocks[:-1], model.blocks[1:], halting.tolist(), strict=False):
        active = state.active
        entered = []
        hook = block.mlp.fc2.register_forward_pre_hook(lambda _, inputs, entered=entered: entered.extend(inputs))
        tokens = masked_block(block, tokens * active[..., None], active)
        hook.remove()
        (hidden,) = entered  # of the MLP
        patches = F.pad(active[:, 1:], (1, 0))
        wish = SPREAD * standardised(target(_seen(following, tokens, active, rank)), active[:, 1:])
        row = _ridge(hidden[patches], wish[active[:, 1:]] - tokens[..., 0][patches])
        tokens[..., 0] += hidden @ row
        # A token halts now if gamma * (t_0 + bias) + beta brings its sum to 1 - eps: who needs the least halts.
        missing = torch.logit(1 - rule.eps - state.cumulative[patches])
        needed = (missing - rule.beta) / rule.gamma - tokens[..., 0][patches]
        number = min(max(round(share * len(images) * len(rank)), 1), len(needed))
        needed = needed.sort().values
        bias = needed[number - 1 : number + 1].mean()  # between two tokens: on one of them, rounding would decide
        block.mlp.fc2.weight[0], block.mlp.fc2.bias[0] = row, bias
        tokens[..., 0] += bias
        score = halting_score(tokens, rule)
        if not rule.class_token_halts:
            score[:, 0] = 0.0
        state, _ = halting_step(state, score, rule.eps)
    model.train(trains)


def _seen(block: nn.Module, tokens: Tensor, active: Tensor, rank: Tensor) -> Seen:
    """What a target sees of the tokens [B, N, D] that enter ``block``."""
    module = block.attn
    query, keys, values = (
        module.qkv(block.norm1(tokens)).unflatten(-1, (3, module.num_heads, module.head_dim)).unbind(2)
    )
    query, keys = module.q_norm(query), module.k_norm(keys)
    return Seen(query[:, 0], keys[:, 1:], values[:, 1:], active[:, 1:], rank)


def _ridge(features: Tensor, wish: Tensor) -> Tensor:
    """The weights [d] with which features [K, d] give ``wish`` [K] but for a constant, by ridge regression."""
    features = features - features.mean(dim=0)
    gram = (features.T @ features).double()
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + penalty, (features.T @ (wish - wish.mean())).double()).to(features.dtype)
