"""Tokens that merge by thresholds, as pure functions (ours; the model: ``adaptive``).

Each layer merges tokens between attention and MLP, as ToMe does (Bolya et al., ICLR 2023, arXiv
2210.09461), but not the same number in every image. The score of a token is its similarity to the
token that can stand for it, minus a weight times the logarithm of its importance to the class
token; it merges where the score exceeds the threshold of the layer. As in A-ViT, each token decides
how deep it is computed, but its scores don't add up over the layers.

Merging by thresholds is not new: they were learned (LTMP; Bonnaerens and Dambre 2023), calibrated
(DyMU, 2025) and set by a formula (ATM, arXiv 2505.15160). New is that images with different numbers
of tokens run as one packed batch: what has merged is computed no more.
"""

from dataclasses import dataclass, replace

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avit_lib.flops import block_flops, fixed_flops, plain_flops
from avit_lib.packed import (
    Layout,
    find_places,
    find_slots,
    packed_mlp,
    pad,
    split_off,
    whole_layout,
)

# Of the logarithm of a token's importance, against similarity (notebook 07 compares)
IMPORTANCE_WEIGHT = 0.2
# Exponent of the schedule of merges over the layers, see ``plan`` (notebook 07 compares)
SPREAD = 1.0


def stand_in(keys: Tensor, layout: Layout, patches: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Of each token [T]: its similarity to its partner, and the row of that partner.

    The similarity is the cosine of ``keys`` [T, d]. Bipartite, as in ToMe: of the ``patches`` [T]
    of an image, which follow ``prefix`` other tokens, every second looks for the most similar one
    among those between. All other tokens have similarity -inf.
    """
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))  # float16 overflows at 256
    keys = keys / _norm(keys).clamp(min=1e-12)[:, None]
    table = pad(keys, layout)[:, prefix:]
    nobody = pad(torch.zeros_like(keys[:, 0]), layout, -torch.inf)[:, prefix:]
    similarity = table[:, 1::2] @ table[:, ::2].transpose(1, 2) + nobody[:, None, ::2]
    best = similarity.max(dim=2)
    first = layout.starts[layout.segment]
    if not best.values.shape[1]:  # in no image is a patch left that looks for a partner
        return torch.full_like(keys[:, 0], -torch.inf), first
    place = find_places(layout) - prefix
    asks = patches & (place % 2 == 1)
    found = layout.segment, (place // 2).clamp(0, best.values.shape[1] - 1)
    score = torch.where(asks, best.values[found], -torch.inf)
    return score, first + prefix + 2 * best.indices[found]


def importance(qkv: Tensor, size: Tensor, layout: Layout, patches: Tensor) -> Tensor:
    """The logarithm of what the class token takes from each token [T], against the mean patch.

    That is attention times norm of the value, mean over heads, relative to the mean over the
    ``patches`` [T] of the image. The class token is the first of its image.
    """
    query, key, value = qkv.unbind(1)  # [T, heads, d]
    query = query[layout.starts].index_select(0, layout.segment)  # of the class token
    logits = torch.linalg.vecdot(query, key) / query.shape[-1] ** 0.5
    logits = logits + size.log()[:, None]  # as in attention
    attention = pad(logits, layout, -torch.inf).softmax(dim=1)
    attention = attention.flatten(0, 1).index_select(0, find_slots(layout))  # [T, heads]
    taken = (attention * _norm(value)).mean(dim=1)
    number = pad(patches, layout).sum(dim=1).clamp(min=1)
    mean = pad(taken * patches, layout).sum(dim=1) / number
    return (taken / mean[layout.segment]).log()


def _norm(vectors: Tensor) -> Tensor:
    """Euclidean norm of short vectors: on CPUs several times as fast as torch's."""
    return torch.linalg.vecdot(vectors, vectors).sqrt()


@dataclass(frozen=True)
class Packed:
    """The tokens of a batch between two layers."""

    tokens: Tensor  # [T, D]
    size: Tensor  # [T] how many of the first tokens each stands for
    layout: Layout
    into: Tensor  # [B * N] which of the first tokens stands for each of them
    depth: Tensor  # [B * N] the layer in which each became part of another, or the last


def pack(tokens: Tensor, layers: int) -> Packed:
    """Tokens [B, N, D] before any have merged, in a model of so many ``layers``."""
    images, count, _ = tokens.shape
    size = torch.ones_like(tokens[..., 0], dtype=torch.promote_types(tokens.dtype, torch.float32))
    layout = whole_layout(images, count, tokens.device)
    depth = torch.full_like(layout.index, layers)
    return Packed(tokens.flatten(0, 1), size.flatten(), layout, layout.index, depth)


def unpack(packed: Packed, values: Tensor) -> Tensor:
    """``values`` [T, D] of the tokens as [B * N, D], in their first places.

    A merged token has that of the token that stands for it.
    """
    row = torch.empty_like(packed.into)
    row[packed.layout.index] = torch.arange(len(values), device=row.device)
    return values[row[packed.into]]


def merge(packed: Packed, goes: Tensor, partner: Tensor, layer: int) -> Packed:
    """The tokens after those that ``goes`` [T] marks have joined the rows ``partner`` [T].

    A token becomes the mean of what is in it, weighted by size. ``layer`` counts from 1.
    """
    layout, stay = split_off(packed.layout, ~goes)
    if stay is None:
        return packed
    gone = goes.nonzero()[:, 0]
    target = partner[gone]
    size = packed.size.index_add(0, target, packed.size[gone])
    # A mean is what it was plus what each that joins differs from it, by its share of the whole.
    share = packed.size[gone] / size[target]
    change = (packed.tokens[gone] - packed.tokens[target]) * share[:, None]
    tokens = packed.tokens.index_add(0, target, change.to(packed.tokens.dtype))
    tokens, size = tokens.index_select(0, stay), size.index_select(0, stay)
    leaves, joins = packed.layout.index[gone], packed.layout.index[target]
    everyone = torch.arange(len(packed.into), device=gone.device)
    into = everyone.index_copy(0, leaves, joins)[packed.into]
    return Packed(tokens, size, layout, into, packed.depth.index_fill(0, leaves, layer))


def feed_forward(block: nn.Module, packed: Packed) -> Packed:
    """The second half of timm's Block, the MLP."""
    return replace(packed, tokens=packed_mlp(block, packed.tokens, packed.layout))


def plan(model: VisionTransformer, count: int, saved: float, spread: float) -> list[float]:
    """How many tokens each layer merges, mean over images, to save about ``saved`` of the FLOPs.

    Layer l merges a share c (l + 1) ** ``spread`` of its remaining patches, at most half; the last
    layer merges none.
    """
    layers, whole = len(model.blocks), plain_flops(model, count)

    def try_scale(scale: float) -> tuple[float, list[float]]:
        left, done, numbers = count, fixed_flops(model), []
        for layer, block in enumerate(model.blocks, start=1):
            merges = layer < layers
            share = min(scale * (layer + 1) ** spread, 0.5) if merges else 0.0
            numbers.append(share * (left - model.num_prefix_tokens))
            done += block_flops(block, left, left - numbers[-1], merges)
            left -= numbers[-1]
        return 1 - done / whole, numbers

    low, high = 0.0, 0.5 if saved else 0.0  # few merges cost more than they save
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if try_scale(middle)[0] < saved else (low, middle)
    return try_scale(high)[1]
