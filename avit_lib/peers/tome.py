"""Token merging (ToMe; Bolya et al., ICLR 2023, arXiv 2210.09461)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avit_lib.errors import UserError
from avit_lib.flops import block_flops
from avit_lib.peers.reduction import TokenReduction, attend_all


def ask(similarity: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """One edge from each row of ``similarity`` [B, n, m] to its best column: ``r`` rows go by it.

    Returns these rows [B, r], their columns [B, r], and the rows that stay, [B, n - r], best first.
    """
    best, partner = similarity.max(dim=2)
    ranked = best.argsort(dim=1, descending=True)
    gone = ranked[:, :r]
    return gone, partner.gather(1, gone), ranked[:, r:]


def match(keys: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching: which of N tokens stay, which of them go, and into whom (section 3).

    ``keys`` [B, N, d] are the attention keys, averaged over heads. Returns the places [B, N - r]
    of those that stay, in their new order, the places [B, r] of those that go, and in the new order
    the places [B, r] of those that they join. Token 0, the class token, stays alone and first.
    """
    keys = F.normalize(keys, dim=-1)
    first, second = keys[:, ::2], keys[:, 1::2]  # alternate tokens: sets A and B
    similarity = first @ second.transpose(1, 2)  # cosine, [B, |A|, |B|]
    similarity[:, 0] = -torch.inf  # the class token is in A: it asks nobody, and is never asked
    gone, joined, left = ask(similarity, r)
    left = left.sort(dim=1).values  # of A; they come first, then all of B
    asked = torch.arange(1, keys.shape[1], 2, device=keys.device).expand(len(keys), -1)
    return torch.cat([2 * left, asked], dim=1), 2 * gone, left.shape[1] + joined


def merge(values: Tensor, stay: Tensor, gone: Tensor, target: Tensor) -> Tensor:
    """Sums [B, N - r, C] of values [B, N, C], those of tokens that go added to those they join.

    ``stay``, ``gone`` and ``target`` are as ``match`` returns them.
    """
    joiners = values.take_along_dim(gone[..., None], dim=1)
    kept = values.take_along_dim(stay[..., None], dim=1)
    return kept.scatter_add(1, target[..., None].expand_as(joiners), joiners)


def merge_pairs(
    block: nn.Module, tokens: Tensor, size: Tensor | None, left: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge the most similar pairs, of set A into set B (``reduce`` of ``TokenReduction``)."""
    tokens, qkv = attend_all(block, tokens, size)
    size = torch.ones_like(tokens[..., :1]) if size is None else size
    places = match(qkv[:, :, 1].mean(dim=2), tokens.shape[1] - left)
    sums = merge(tokens * size, *places)
    size = merge(size, *places)
    stay, gone, _ = places
    return sums / size, size, stay, gone


def merge_flops(block: nn.Module, count: int, left: int) -> float:
    """FLOPs of a layer that merges; ``match`` has each key of A with each of B, mean over heads."""
    matched = (count - count // 2) * (count // 2) * block.attn.head_dim
    return block_flops(block, count, left) + matched


def leave_by_number(r: int, step: int = 1, first: int = 1) -> Callable[[int, int], int]:
    """``count_left`` of ``TokenReduction`` where ``r`` tokens leave in layers from ``first`` on.

    At most half of the patches leave in a layer; with ``step`` 2, in every second layer alone.
    Raises UserError for r < 0.
    """
    if r < 0 or r % 1 or step < 1 or step % 1:
        raise UserError(f"{r} tokens in every {step}th layer cannot merge; take whole numbers")

    def count_left(layer: int, count: int) -> int:
        most = (count - 1) // 2  # all of A but the class token
        return count if layer < first or layer % step else count - min(r, most)

    return count_left


def merge_tokens(model: VisionTransformer, r: int, step: int = 1) -> TokenReduction:
    """A trained ``model`` that merges the ``r`` most similar pairs in each layer.

    With ``step`` 2 it merges in every second layer alone, which the paper doesn't try. Raises
    UserError as ``leave_by_number`` and ``TokenReduction``.
    """
    return TokenReduction(model, leave_by_number(r, step), merge_pairs, merge_flops)
