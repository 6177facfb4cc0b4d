"""Tokens that merge by thresholds, as pure functions: our method; ``adaptive`` holds its model.

As in ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461), tokens merge between attention and MLP; but
by default in every second layer, and not the same number in every image. The score of a token is
its similarity to the token that can stand for it, minus a weight times the logarithm of its
importance to the class token. It merges where the score exceeds the threshold of the layer.

Merging by thresholds is not new: they were learned (LTMP; Bonnaerens and Dambre 2023), calibrated
without labels (DyMU, 2025) and set by a formula (ATM, arXiv 2505.15160). Nor is importance in the
choice of what merges (ToMeCIS, Seol et al. 2023; MCTF, arXiv 2403.10030). Here both meet, and
images with different numbers of tokens run as one packed batch.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avit_lib.backbone import attend_as_class
from avit_lib.flops import block_flops, fixed_flops, matching_flops, plain_flops
from avit_lib.packed import Layout, packed_mlp, split_off, to_packed, whole_layout

# Weight of the logarithm of importance, against similarity (notebook 07 compares)
IMPORTANCE_WEIGHT = 0.2
# Exponent of the schedule of merges over the layers, see ``plan`` (notebook 07 compares)
SPREAD = 1.0
# Layers from one merge to the next: to merge costs time (notebook 07 compares)
STEP = 2
# About how many lengths images may have: those that share one are scored in one call
LENGTHS = 24


def find_partners(key: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """The similarity of every second patch to its partner, and where in its image that one lies.

    Both [S, m] with m = (n - prefix) // 2. Bipartite, as in ToMe: of the patches of an image, which
    follow ``prefix`` other tokens, numbers 1, 3, 5, ... each look for the most similar of 0, 2, 4,
    ... Similarity is the cosine of their keys, averaged over heads, in ``key`` [S, heads, n, d].
    """
    key = key.to(torch.promote_types(key.dtype, torch.float32))  # 256 squared overflows float16
    patches = F.normalize(key.sum(dim=1)[:, prefix:], dim=-1)
    best = (patches[:, 1::2] @ patches[:, ::2].transpose(1, 2)).max(dim=2)
    return best.values, prefix + 2 * best.indices


def importance(query: Tensor, key: Tensor, value: Tensor, log_size: Tensor, prefix: int) -> Tensor:
    """The logarithm of what the class token takes from each patch [S, n - prefix].

    It takes attention times the norm of the value; this is relative to the mean over the patches.
    Arguments as of ``attend_as_class``, with the logarithm of the tokens' sizes [S, n] as bias.
    """
    taken = attend_as_class(query, key, value, log_size)[:, prefix:]
    tiny = torch.finfo(taken.dtype).tiny
    return (taken / taken.mean(dim=1, keepdim=True)).clamp(min=tiny).log()


@dataclass(frozen=True)
class Candidates:
    """Who may merge in a layer, of S images that all have n tokens."""

    score: Tensor  # [S, n], -inf: may not
    partner: Tensor  # [S, n] the row, among its image's tokens, of the one that can stand for it


def score_tokens(
    query: Tensor, key: Tensor, value: Tensor, log_size: Tensor, prefix: int, weight: float
) -> Candidates:
    """Score tokens by similarity minus ``weight`` times ``importance``; arguments as of both.

    With weight 0 no class token is needed.
    """
    best, place = find_partners(key, prefix)
    if weight:
        taken = importance(query, key, value, log_size, prefix)
        best = best - weight * taken[:, 1::2]
    score = torch.full_like(log_size, -torch.inf, dtype=best.dtype)
    score[:, prefix + 1 :: 2] = best
    partner = torch.zeros_like(score, dtype=torch.long)
    partner[:, prefix + 1 :: 2] = place
    return Candidates(score, partner)


def choose(found: Candidates, threshold: float, grain: int) -> Tensor:
    """Which tokens merge, [S, n] bool: those whose score exceeds the threshold.

    Those that score least among them stay, as many as it takes for the image to keep a multiple of
    ``grain`` tokens; where too few exceed the threshold for that, none merges.
    """
    above = (found.score > threshold).sum(dim=1, keepdim=True)
    number = (above - (above - found.score.shape[1]) % grain).clamp(min=0)  # n - number: a multiple
    limit = found.score.sort(dim=1, descending=True).values.gather(1, number)
    return found.score > limit.clamp(min=threshold)


@dataclass(frozen=True)
class Packed:
    """The tokens of a batch between two layers."""

    tokens: Tensor  # [T, D]
    size: Tensor  # [T] how many of the original tokens each stands for
    layout: Layout
    into: Tensor  # [B * N] which of the original tokens stands for each of them
    depth: Tensor  # [B * N] the layer in which each merged into another; L if it never did

    @property
    def grain(self) -> int:
        """Of how many tokens each image keeps a multiple."""
        return max(1, len(self.into) // len(self.layout.lengths) // LENGTHS)


def pack(tokens: Tensor, layers: int) -> Packed:
    """Tokens [B, N, D] before any have merged, in a model of so many ``layers``."""
    images, count, _ = tokens.shape
    size = torch.ones_like(tokens[..., 0], dtype=torch.promote_types(tokens.dtype, torch.float32))
    layout = whole_layout(images, count, tokens.device)
    depth = torch.full_like(layout.index, layers)
    return Packed(tokens.flatten(0, 1), size.flatten(), layout, layout.index, depth)


def unpack(packed: Packed, values: Tensor) -> Tensor:
    """``values`` [T, D] of the tokens as [B * N, D], at the tokens' original positions.

    A token that merged into another has the value of the one that stands for it.
    """
    row = torch.empty_like(packed.into)
    row[packed.layout.index] = torch.arange(len(values), device=row.device)
    return values[row[packed.into]]


def merge(packed: Packed, found: list[Candidates], threshold: float, layer: int) -> Packed:
    """The tokens after those that ``choose`` picks have merged.

    ``found`` has the candidates of each table of ``to_dense``. Each target becomes the mean of
    itself and its joiners, weighted by size. ``layer`` counts from 1.
    """
    goes = to_packed([choose(one, threshold, packed.grain) for one in found])
    partner = to_packed([one.partner for one in found])
    layout, stay = split_off(packed.layout, ~goes)
    if stay is None:
        return packed
    gone = torch.nonzero_static(goes, size=len(goes) - len(stay))[:, 0]
    target = packed.layout.starts[packed.layout.segment[gone]] + partner[gone]
    size = packed.size.index_add(0, target, packed.size[gone])
    # New mean = old one + sum of (joiner - old one) * size of the joiner / new size.
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


def plan(
    model: VisionTransformer, count: int, saved: float, spread: float, step: int
) -> list[float]:
    """How many tokens each layer merges, mean over images, to save about ``saved`` of the FLOPs.

    Every ``step``-th layer l merges a share c (l + 1) ** ``spread`` of its remaining patches, at
    most half; if that cannot save enough, every layer does. The last layer never merges.
    """
    layers, whole = len(model.blocks), plain_flops(model, count)

    def try_scale(scale: float) -> tuple[float, list[float]]:
        left, done, numbers = count, fixed_flops(model, count), []
        for layer, block in enumerate(model.blocks, start=1):
            merges = layer < layers and layer % step == 0
            share = min(scale * (layer + 1) ** spread, 0.5) if merges else 0.0
            numbers.append(share * (left - model.num_prefix_tokens))
            chosen = matching_flops(block, left) if merges else 0
            done += block_flops(block, left, left - numbers[-1]) + chosen
            left -= numbers[-1]
        return 1 - done / whole, numbers

    low, high = 0.0, 0.5 if saved else 0.0  # or it would merge to pay for looking who merges
    if saved and step > 1 and try_scale(high)[0] < saved:
        return plan(model, count, saved, spread, 1)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if try_scale(middle)[0] < saved else (low, middle)
    return try_scale(high)[1]
