"""Where halting starts: what gamma, beta and channel 0 are before any training.

With beta too low nothing halts at first; with beta too high most tokens halt before a trained
backbone has used them. So beta is calibrated to a depth of one's choice (``calibrate_beta``). But
channel 0 of a trained backbone is arbitrary, and so are the tokens that halt first. ``fit_start``
(not in the paper) writes into it, in closed form, what the backbone knows of its tokens already:
ridge regression on training images finds the weights with which channel 0 says, layer by layer, how
well each patch can be spared: how little the class token attends to it in the next layer
(``unimportance``). No parameter is added: channel 0 is freed of what it meant to the backbone, and
learns at a rate of its own (``scale_channel_rate``).
"""

from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from avit_lib.backbone import attend_as_class, check_images, evaluating
from avit_lib.errors import UserError
from avit_lib.halting import channel_to_halt, halting_score, halting_step, initial_state
from avit_lib.model import AViT, masked_block

TOLERANCE = 0.05  # layers by which a calibrated depth may miss the wish
FAR = 1e4  # a beta at which all tokens halt at once; at its opposite, none does
# Standard deviation over patches that channel 0 is fitted to: with gamma 5, logits of several units
SPREAD = 0.7
# How much lower channel 0 of the class token starts: it halts by its own score, but late
LEAD = 2.0
# In units of the mean square of the features: small weights, so that training moves no score far
RIDGE = 2.0


@torch.inference_mode()
def calibrate_beta(model: AViT, images: Tensor, wish: float) -> float:
    """The beta that gives images [B, C, H, W] a mean depth of ``wish`` layers.

    Stops within ``TOLERANCE`` of the wish, or where the depth jumps over it; the model is left as
    it is. Raises UserError for a wish below the least depth that any beta gives, or above the
    greatest.
    """
    check_images(images)
    probe = deepcopy(model).eval()

    @cache
    def excess(beta: float) -> float:
        """Layers above the wish; 0 where it is met."""
        probe.beta = beta
        depth = probe.forward_with_trace(images)[1].depth  # of each token to its own halting
        found = depth.float().mean().item() - wish
        return 0.0 if abs(found) <= TOLERANCE else found

    now, step = model.beta.item(), 1.0
    while not excess(now - step) >= 0 >= excess(now + step):  # high beta: tokens halt soon
        step *= 2
        if step > FAR:
            raise UserError(
                f"a mean depth of {wish} is out of reach; choose one between "
                f"{wish + excess(FAR):g} and {wish + excess(-FAR):g} layers"
            )
    low, high = now - step, now + step
    while excess(low) and excess(high) and high - low > 1e-4:
        share = excess(low) / (excess(low) - excess(high))  # as if depth were linear between them
        beta = low + min(max(share, 0.2), 0.8) * (high - low)
        if excess(beta) > 0:
            low = beta
        else:
            high = beta
    return low if excess(high) else high  # on the deeper side of a jump: less is lost


# --- which patches can be spared ------------------------------------------------------------------
# Of the next block: the tokens [B, N, D] that enter it, and which of them are active [B, N].


def class_attention(block: nn.Module, tokens: Tensor, active: Tensor) -> Tensor:
    """What the class token takes from each patch, [B, N - 1]: attention times norm of the value.

    Mean over heads. Attention among the patches: a head in which the class token attends to itself
    counts like any other.
    """
    layer = block.attn
    qkv = layer.qkv(block.norm1(tokens)).unflatten(-1, (3, layer.num_heads, layer.head_dim))
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    bias = torch.zeros_like(tokens[..., 0]).masked_fill(~active, -torch.inf)
    bias[:, 0] = -torch.inf
    return attend_as_class(layer.q_norm(query), layer.k_norm(key), value, bias)[:, 1:]


def unimportance(block: nn.Module, tokens: Tensor, active: Tensor) -> Tensor:
    """Minus the logarithm of ``class_attention``: how well each patch can be spared [B, N - 1]."""
    taken = class_attention(block, tokens, active)
    return -taken.clamp_min(torch.finfo(taken.dtype).tiny).log()


def standardise(values: Tensor, active: Tensor) -> Tensor:
    """``values`` shifted and scaled to mean 0 and standard deviation 1 over those ``active``."""
    chosen = values[active]
    return (values - chosen.mean()) / chosen.std(correction=0).clamp(min=1e-6)


# --- channel 0, fitted ----------------------------------------------------------------------------


def channel_parameters(model: AViT) -> Iterator[tuple[nn.Parameter | None, int | tuple]]:
    """Where channel 0 is written and, by norms, read: parameters, each with the index of its part.

    None stands for a parameter that the model lacks.
    """
    yield model.cls_token, (..., 0)
    yield model.pos_embed, (..., 0)
    layers, norms = [model.patch_embed.proj], [model.norm]
    for norm in (model.patch_embed.norm, model.norm_pre):
        yield from ((one, 0) for one in norm.parameters())
    for block in model.blocks:
        layers += [block.attn.proj, block.mlp.fc2]
        norms += [block.norm1, block.norm2]
        yield from ((scale, 0) for scale in _layer_scales(block))
    for layer in layers:
        yield layer.weight, 0
        yield layer.bias, 0
    for norm in norms:
        yield getattr(norm, "weight", None), 0


def _check_parameters(model: AViT) -> None:
    """Raise UserError where channel 0 is written by what is no parameter, but made of others."""
    layers = {type(part) for block in model.blocks for part in (block.attn.proj, block.mlp.fc2)}
    layers |= {type(model.patch_embed.proj)}
    own = all(isinstance(one, nn.Parameter | None) for one, _ in channel_parameters(model))
    if not own or layers != {nn.Linear, nn.Conv2d}:
        raise UserError(
            "channel 0 is written by weights that prune, weight_norm or an adapter such as LoRA "
            "makes anew in every step; remove or merge them first"
        )


def _layer_scales(block: nn.Module) -> list[nn.Parameter]:
    return [*block.ls1.parameters(), *block.ls2.parameters()]


def scale_channel_rate(model: AViT, optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let channel 0 learn ``rate`` times as fast as all else; 0 holds it as it is.

    Steps are scaled, not gradients: Adam would undo that. The last call for an optimizer counts.
    Raises UserError for an optimizer that calls no hooks of its steps, as timm's Lookahead.
    """
    _check_parameters(model)
    if not hasattr(type(optimizer).step, "hooked"):
        raise UserError(
            f"{type(optimizer).__name__} calls no hooks of its steps; take an optimizer of torch's"
        )
    before = []

    def remember(*_) -> None:
        before[:] = [
            (parameter, index, parameter[index].detach().clone())
            for parameter, index in channel_parameters(model)
            if parameter is not None
        ]

    @torch.no_grad()
    def scale(*_) -> None:
        for parameter, index, old in before:
            parameter[index] = torch.lerp(old, parameter[index], rate)

    for hook in getattr(optimizer, "channel_hooks", ()):
        hook.remove()
    hooks = [optimizer.register_step_pre_hook(remember)]
    hooks.append(optimizer.register_step_post_hook(scale))
    optimizer.channel_hooks = hooks  # which the next call removes


@torch.no_grad()
def fit_start(model: AViT, images: Tensor, halting: Tensor) -> None:
    """Fit channel 0 of ``model``, in place: the patches that can be spared halt first.

    ``images`` are [B, C, H, W]; ``halting`` [L] says which part of all patches halts in which
    layer, the paper's target distribution say. Channel 0 starts, of each position, as the mean of
    ``unimportance`` there; each MLP adds what is missing to that in the attention of the next
    layer, whole where a layer scale follows. Raises UserError when less than a patch of an image is
    left for the last layer, when ``halting`` is no distribution over its layers, for images of
    another size, and for a model in which channel 0 is not free to be written: before the first
    change.
    """
    check_images(images)
    _check_parameters(model)
    if images.dtype.itemsize < 4:
        raise UserError("the fit of channel 0 takes single precision; convert by float()")
    missing = any(parameter is None for parameter, _ in channel_parameters(model))
    norms = model.patch_embed.norm, model.norm_pre
    between = any(type(one) is not nn.Identity for one in norms)
    if missing or between or not model.gamma > 0 or 1 - model.eps == 1:
        raise UserError(
            "the fit of channel 0 takes learned positions, biases, weights in all norms, no norm "
            "before the first layer, a gamma above 0, and an eps of 1e-7 or more; leave it out"
        )
    layers, patches = len(model.blocks), model.patch_embed.num_patches
    grid = model.patch_embed.dynamic_feat_size(images.shape[2:])
    made_for = tuple(images.shape[2:]) == model.patch_embed.img_size
    if layers < 2 or grid != model.patch_embed.grid_size or not made_for:
        raise UserError(
            "the fit of channel 0 takes two layers or more, and images of the size that the model "
            "is made for"
        )
    shares = len(halting) == layers and halting.min() >= 0 and abs(halting.sum() - 1) < 1e-3
    if not shares or halting[-1] * patches < 1:
        raise UserError(
            f"halting must have a share of the patches for each of {layers} layers, and leave the "
            f"last a patch of each image; raise target_depth or target_std"
        )
    with evaluating(model), torch.autocast(images.device.type, enabled=False):
        model.embed(images[:1])  # fails here where images are of another kind
        _write_channel(model, images, halting)


def _write_channel(model: AViT, images: Tensor, halting: Tensor) -> None:
    """``fit_start`` of what it has checked, for a model in evaluation mode."""
    patches = model.patch_embed.num_patches
    for parameter, index in channel_parameters(model):
        parameter[index] = 0.0
    for block in model.blocks:
        for scale in _layer_scales(block):
            scale[0] = 1.0
    model.cls_token[..., 0] = -LEAD
    everyone = torch.ones(len(images), patches + 1, dtype=torch.bool, device=images.device)
    first = masked_block(model.blocks[0], model.embed(images), everyone)
    wish = standardise(unimportance(model.blocks[1], first, everyone), everyone[:, 1:])
    model.pos_embed[0, -patches:, 0] = SPREAD * wish.mean(dim=0)
    tokens = model.embed(images)
    state = initial_state(halting_score(tokens, model.rule))
    for (block, following), share in zip(pairwise(model.blocks), halting.tolist(), strict=False):
        active = state.active
        left = active[:, 1:]  # patches
        if not left.any():  # patches that are all alike halt together
            break
        entered = []
        hook = block.mlp.fc2.register_forward_pre_hook(
            lambda _, inputs, entered=entered: entered.extend(inputs)
        )
        tokens = masked_block(block, tokens * active[..., None], active)
        hook.remove()
        (hidden,) = entered  # of the MLP
        wish = SPREAD * standardise(unimportance(following, tokens, active), left)
        row = _solve_ridge(hidden[:, 1:][left], (wish - tokens[:, 1:, 0])[left])
        tokens[..., 0] += hidden @ row
        # With this bias, so many patches halt: those that need the least.
        needed = channel_to_halt(state.cumulative, model.rule) - tokens[..., 0]
        needed = needed[:, 1:][left].sort().values
        number = min(max(round(share * len(images) * patches), 1), len(needed))
        # Between two tokens: on one of them, rounding would decide.
        bias = needed[number - 1 : number + 1].mean()
        block.mlp.fc2.weight[0] = row
        block.mlp.fc2.bias[0] = bias
        tokens[..., 0] += bias
        state, _ = halting_step(state, halting_score(tokens, model.rule), model.rule.eps)


def _solve_ridge(features: Tensor, wish: Tensor) -> Tensor:
    """The weights [d] with which features [K, d] give ``wish`` [K] but for a constant."""
    features = features - features.mean(dim=0)
    gram = (features.T @ features).double()
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    products = features.T @ (wish - wish.mean())
    return torch.linalg.solve(gram + penalty, products.double()).to(features.dtype)
