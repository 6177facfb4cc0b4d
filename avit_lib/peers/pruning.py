"""Pruning in three layers: EViT (Liang et al., ICLR 2022, arXiv 2202.07800), and two floors for it.

EViT keeps the patches to which the class token attends most, and fuses all others into one token.
What that token is worth is told by dropping it (top-k), what the choice is worth by a random one.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avit_lib.errors import UserError
from avit_lib.flops import block_flops
from avit_lib.peers.reduction import TokenReduction, attend_all


def attend_to_patches(qkv: Tensor) -> Tensor:
    """Attention of the class token to each patch, mean over heads [B, N - 1] (section 3.1)."""
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, N, d]
    logits = query[:, :, :1] @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    return logits.softmax(dim=3).mean(dim=1)[:, 0, 1:]


def draw_worth(qkv: Tensor) -> Tensor:
    """Random numbers [B, N - 1], always the same for a place in a batch."""
    generator = torch.Generator(qkv.device).manual_seed(0)
    return torch.rand(len(qkv), qkv.shape[1] - 1, generator=generator, device=qkv.device)


def keep_best(
    rate: Callable[[Tensor], Tensor],
    fuse: bool,
    block: nn.Module,
    tokens: Tensor,
    size: None,
    left: int,
) -> tuple[Tensor, None, Tensor, Tensor]:
    """Keep the class token and the patches that ``rate`` [B, N - 1] rates best.

    With ``fuse`` one of those left is the sum of all others, each weighted by its rate (equation
    3). The rest is as ``reduce`` of ``TokenReduction``.
    """
    tokens, qkv = attend_all(block, tokens, size)
    worth = F.pad(rate(qkv), (1, 0), value=torch.inf)  # the class token stays, and is first
    ranked = worth.argsort(dim=1, descending=True)
    stay, gone = ranked[:, : left - fuse], ranked[:, left - fuse :]
    kept = tokens.take_along_dim(stay[..., None], dim=1)
    if not fuse:
        return kept, None, stay, gone
    parts = worth.gather(1, gone)[..., None] * tokens.take_along_dim(gone[..., None], dim=1)
    kept = torch.cat([kept, parts.sum(dim=1, keepdim=True)], dim=1)
    return kept, None, F.pad(stay, (0, 1), value=tokens.shape[1]), gone


def rate_flops(block: nn.Module, count: float | Tensor) -> float | Tensor:
    """FLOPs of ``attend_to_patches``: the class token's query with all keys."""
    return count * block.attn.num_heads * block.attn.head_dim


def prune_flops(block: nn.Module, count: int, left: int) -> float:
    """FLOPs of a layer in which patches are rated and leave."""
    return block_flops(block, count, left) + rate_flops(block, count)


def prune(
    model: VisionTransformer, keep: float, rate: Callable = attend_to_patches, fuse: bool = True
) -> TokenReduction:
    """A trained ``model`` that keeps a share of the patches in layers 4, 7 and 10 of 12 (EViT).

    Those are the ones after each quarter. Raises UserError unless ``keep`` is above 0 and at most
    1, and as ``TokenReduction``.
    """
    if not 0 < keep <= 1:
        raise UserError(f"a share of {keep} of the patches cannot be kept; take one up to 1")
    quarters = [1 + len(model.blocks) * quarter // 4 for quarter in (1, 2, 3)]

    def count_left(layer: int, count: int) -> int:
        left = 1 + math.ceil(keep * (count - 1)) + fuse
        return min(left, count) if layer in quarters else count

    return TokenReduction(model, count_left, partial(keep_best, rate, fuse), prune_flops)
