"""Where halting starts: what gamma, beta and channel 0 are before any training.

With beta too low, epochs pass before anything halts; too high, and the first steps tear a trained
backbone apart. So beta is calibrated to a depth of one's choice (``calibrated_beta``). But channel
0 of a trained backbone is arbitrary, and so are the tokens that halt first. ``fit_start`` (not in
the paper) writes into it, in closed form, what the backbone knows of its tokens already: ridge
regression on training images finds the weights with which channel 0 says, layer by layer, how well
each patch can be spared. A ``Redundancy`` defines that: how little the class token attends to it in
the next layer (``unimportance``), or a function of your own. No parameter is added: channel 0 is
freed of what it meant to the backbone, and learns at a rate of its own (``scale_channel_rate``).
"""

from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from avit_lib.backbone import check_images
from avit_lib.errors import UserError
from avit_lib.halting import halting_score, halting_step, initial_state
from avit_lib.model import AViT, masked_block

TOLERANCE = 0.05  # layers by which a calibrated depth may miss the wish
# Standard deviation over patches that channel 0 is fitted to: with gamma 5, logits of several units
SPREAD = 0.7
LEAD = (
    2.0  # how much lower channel 0 of the class token starts: it halts by its own score, but late
)
# In units of the mean square of the features: small weights, so that training moves no score far
RIDGE = 2.0


@torch.inference_mode()
def mean_depth(model: AViT, images: Tensor) -> float:
    """Mean depth in layers over all tokens of images [B, C, H, W], every token to its own
    halting.
    """
    return model.forward_with_trace(images)[1].depth.float().mean().item()


def calibrated_beta(model: AViT, images: Tensor, gamma: float, eps: float, wish: float) -> float:
    """The beta, by bisection, with which ``model`` reaches a mean depth of ``wish`` layers on
    images [B, C, H, W].

    Stops within ``TOLERANCE`` of the wish, or where the depth jumps over it; the model is left as
    it is. Raises UserError unless the wish lies between the least depth and the greatest that any
    beta gives.
    """
    check_images(images)
    probe = deepcopy(model).eval()
    probe.gamma, probe.eps = gamma, eps

    def depth(beta: float) -> float:
        probe.beta = beta
        return mean_depth(probe, images)

    shallowest, deepest = depth(1e4), depth(-1e4)  # the higher beta, the sooner tokens halt
    if not shallowest < wish < deepest:
        raise UserError(
            f"a mean depth of {wish} is out of reach; choose one between {shallowest:g} and {deepest:g} layers"
        )
    low, high = -1.0, 1.0
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


# --- which patches can be spared ------------------------------------------------------------------

# How well each patch can be spared, [B, N - 1], higher halts sooner; of the next block, the tokens
# [B, N, D] that enter it and which of them are active [B, N].
Redundancy = Callable[[nn.Module, Tensor, Tensor], Tensor]


def class_attention(block: nn.Module, tokens: Tensor, active: Tensor) -> Tensor:
    """What the class token takes from each patch [B, N - 1]: attention times norm of the value,
    mean over heads.

    Attention among the patches: a head in which the class token attends to itself counts like any
    other.
    """
    layer = block.attn
    query, key, value = (
        layer.qkv(block.norm1(tokens)).unflatten(-1, (3, layer.num_heads, layer.head_dim)).unbind(2)
    )
    query, key, value = layer.q_norm(query[:, 0]), layer.k_norm(key[:, 1:]), value[:, 1:]
    logits = torch.einsum("bhd,bphd->bph", query, key) / layer.head_dim**0.5
    attention = logits.masked_fill(~active[:, 1:, None], -torch.inf).softmax(dim=1)
    return (attention * value.norm(dim=-1)).mean(dim=2)


def unimportance(block: nn.Module, tokens: Tensor, active: Tensor) -> Tensor:
    """Minus the logarithm of ``class_attention``."""
    taken = class_attention(block, tokens, active)
    return -taken.clamp_min(torch.finfo(taken.dtype).tiny).log()


def standardised(values: Tensor, active: Tensor) -> Tensor:
    """``values`` shifted and scaled to mean 0 and standard deviation 1 over those ``active``."""
    chosen = values[active]
    return (values - chosen.mean()) / chosen.std(correction=0).clamp(min=1e-6)


# --- channel 0, fitted ----------------------------------------------------------------------------


def channel_parameters(model: AViT) -> Iterator[tuple[nn.Parameter | None, int | tuple]]:
    """Where channel 0 is written and, by norms and a projection, read: parameters, each with the
    index of its part.

    None stands for a parameter that the model lacks.
    """
    yield model.cls_token, (..., 0)
    yield model.pos_embed, (..., 0)
    layers = [
        model.patch_embed.proj,
        *(layer for block in model.blocks for layer in (block.attn.proj, block.mlp.fc2)),
    ]
    norms = [model.norm, *(norm for block in model.blocks for norm in (block.norm1, block.norm2))]
    yield from ((parameter, 0) for layer in layers for parameter in (layer.weight, layer.bias))
    yield from ((getattr(norm, "weight", None), 0) for norm in norms)
    yield from ((scale, 0) for block in model.blocks for scale in _scales(block))
    if model.direction is not None:
        yield model.direction, ...


def _scales(block: nn.Module) -> list[nn.Parameter]:
    return [*block.ls1.parameters(), *block.ls2.parameters()]


def scale_channel_rate(model: AViT, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let channel 0 learn ``rate`` times as fast as all else; 0 holds it as it is.

    Steps are scaled, not gradients: Adam would undo that.
    """
    parts, before = [part for part in channel_parameters(model) if part[0] is not None], []

    def remember(*_) -> None:
        before[:] = [parameter[index].detach().clone() for parameter, index in parts]

    @torch.no_grad()
    def scale(*_) -> None:
        for (parameter, index), old in zip(parts, before, strict=True):
            parameter[index] = torch.lerp(old, parameter[index], rate)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(scale)


@torch.no_grad()
def fit_start(
    model: AViT, images: Tensor, halting: Tensor, target: Redundancy = unimportance
) -> None:
    """Fit channel 0 of ``model``, in place, so that on images [B, C, H, W] the patches halt first
    that can be spared.

    ``halting`` [L] says which part of all patches halts in which layer, the paper's target
    distribution say. Channel 0 starts, of each position, as the mean of ``target`` there; each MLP
    adds what is missing to the target in the attention of the next layer, whole where a layer scale
    follows. A learned projection starts as channel 0 again. Raises UserError when less than a patch
    of an image is left for the last layer, when ``halting`` is of another number of layers, and for
    a model in which channel 0 is not free to be written: before the first change.
    """
    check_images(images)
    if any(parameter is None for parameter, _ in channel_parameters(model)):
        raise UserError(
            "the fit of channel 0 takes learned positions, biases, and weights in all norms; leave it out"
        )
    if len(halting) != len(model.blocks):
        raise UserError(
            f"halting is given for {len(halting)} layers, the model has {len(model.blocks)}"
        )
    rule, trains = model.rule, model.training
    patches = model.patch_embed.num_patches
    if halting[-1] * patches < 1:
        raise UserError(
            "halting by this target leaves no patch for the last layer; raise target_depth or target_std"
        )
    model.eval()
    for parameter, index in channel_parameters(model):
        parameter[index] = 0.0
    for scale in (scale for block in model.blocks for scale in _scales(block)):
        scale[0] = 1.0
    if model.direction is not None:
        model.direction[0] = 1.0
    model.cls_token[..., 0] = -LEAD
    everyone = torch.ones(len(images), patches + 1, dtype=torch.bool, device=images.device)
    first = masked_block(model.blocks[0], model.embed(images), everyone)
    wish = SPREAD * standardised(target(model.blocks[1], first, everyone), everyone[:, 1:])
    model.pos_embed[0, -patches:, 0] = wish.mean(dim=0)
    tokens = model.embed(images)
    state = initial_state(halting_score(tokens, rule))
    for block, following, share in zip(
        model.blocks[:-1], model.blocks[1:], halting[:-1].tolist(), strict=True
    ):
        active = state.active
        if not active[:, 1:].any():  # patches that are all alike halt together
            break
        entered = []
        hook = block.mlp.fc2.register_forward_pre_hook(
            lambda _, inputs, entered=entered: entered.extend(inputs)
        )
        tokens = masked_block(block, tokens * active[..., None], active)
        hook.remove()
        (hidden,) = entered  # of the MLP
        left = active[:, 1:]  # patches
        wish = SPREAD * standardised(target(following, tokens, active), left)
        row = _ridge(hidden[:, 1:][left], (wish - tokens[:, 1:, 0])[left])
        tokens[..., 0] += hidden @ row
        # A token halts now if gamma * (t_0 + bias) + beta brings its sum to 1 - eps: who needs the
        # least halts.
        missing = torch.logit(1 - rule.eps - state.cumulative[:, 1:][left])
        needed = (missing - rule.beta) / rule.gamma - tokens[:, 1:, 0][left]
        number = min(max(round(share * len(images) * patches), 1), len(needed))
        needed = needed.sort().values
        bias = needed[
            number - 1 : number + 1
        ].mean()  # between two tokens: on one of them, rounding would decide
        block.mlp.fc2.weight[0], block.mlp.fc2.bias[0] = row, bias
        tokens[..., 0] += bias
        score = halting_score(tokens, rule)
        if not rule.class_token_halts:
            score[:, 0] = 0.0
        state, _ = halting_step(state, score, rule.eps)
    model.train(trains)


def _ridge(features: Tensor, wish: Tensor) -> Tensor:
    """The weights [d] with which features [K, d] give ``wish`` [K] but for a constant, by ridge
    regression.
    """
    features = features - features.mean(dim=0)
    gram = (features.T @ features).double()
    penalty = (
        RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    )
    return torch.linalg.solve(gram + penalty, (features.T @ (wish - wish.mean())).double()).to(
        features.dtype
    )
