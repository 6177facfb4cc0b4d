"""Multi-criteria token fusion (MCTF; Lee, Choi and Kim, CVPR 2024, arXiv 2403.10030).

Tokens fuse at the start of a layer, before its values are computed, by its own attention: "one step
ahead". As in the authors' code all layers but the first fuse, and informativeness is the attention
that all tokens, not the class token alone, pay to one; unlike there, fewer than 10 may be left. The
authors fuse the attention map; here what it reads is fused, which gives the same at a few more
FLOPs. They train with token-reduction consistency; here all peers are trained by one recipe.
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from avit_lib.errors import UserError
from avit_lib.flops import block_flops, linear_flops
from avit_lib.peers.reduction import TokenReduction
from avit_lib.peers.tome import ask, leave_by_number

# Temperatures of informativeness and size; that of similarity is 1.
TAU_INFO, TAU_SIZE = 20, 40


@torch.no_grad()
def match(tokens: Tensor, ease: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bidirectional bipartite soft matching: who of N tokens fuses into whom.

    Two tokens [B, N, D] attract each other by their similarity, between 0 and 1, times the ``ease``
    [B, N, 1] of both. Half of the ``r`` that go are of set A and join one of B; the others are of B
    and join one that is left of A. Returns the places [B, N - r] of those that stay, in their new
    order, the places [B, r] of those that go, and where in the new order each is found [B, N, 1].
    Token 0, the class token, stays alone and first.
    """
    tokens = ease * F.pad(F.normalize(tokens, dim=-1), (0, 1), value=1)  # the 1 is added to cosines
    attraction = tokens[:, ::2] @ tokens[:, 1::2].transpose(1, 2)  # 2 W, [B, |A|, |B|]
    attraction[:, 0] = -torch.inf  # the class token is in A
    gone, joined, left = ask(attraction, r // 2)
    left = left.sort(dim=1).values
    attraction = attraction.take_along_dim(left[..., None], dim=1).transpose(1, 2)
    gone_b, joined_b, left_b = ask(attraction, r - r // 2)
    stay = torch.cat([2 * left, 2 * left_b + 1], dim=1)
    into = torch.empty_like(ease[..., 0], dtype=torch.long)
    into.scatter_(1, stay, torch.arange(stay.shape[1], device=stay.device).expand_as(stay))
    into.scatter_(1, 2 * gone_b + 1, joined_b)
    into.scatter_(1, 2 * gone, into.gather(1, 2 * joined + 1))  # the joined may have gone, too
    return stay, torch.cat([2 * gone, 2 * gone_b + 1], dim=1), into[..., None]


def add_up(values: Tensor, into: Tensor, left: int) -> Tensor:
    """Sums [B, left, C] of the values [B, N, C] that go ``into`` [B, N, 1] the same place."""
    sums = values.new_zeros(len(values), left, values.shape[2])
    return sums.scatter_add(1, into.expand_as(values), values)


def project(attn: nn.Module, tokens: Tensor, rows: slice) -> Tensor:
    """Queries, keys or values, as many as ``rows`` of their weights tell: [n, B, heads, N, d]."""
    part = {name: values[rows] for name, values in attn.qkv.named_parameters()}
    projected = functional_call(attn.qkv, part, tokens)
    return projected.unflatten(2, (-1, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)


def fuse(
    block: nn.Module, tokens: Tensor, size: Tensor | None, left: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fuse the tokens that attract each other most (``reduce`` of ``TokenReduction``)."""
    attn = block.attn
    split = 2 * attn.num_heads * attn.head_dim
    size = torch.ones_like(tokens[..., :1]) if size is None else size
    query, key = project(attn, block.norm1(tokens), slice(split))
    logits = attn.q_norm(query) @ attn.k_norm(key).transpose(2, 3) * attn.scale
    attention = (logits + size.log()[:, None].transpose(2, 3)).softmax(dim=3)  # A
    worth = attention.detach().mean(dim=(1, 2))[..., None]  # informativeness a [B, N, 1]
    ease = worth ** (-1 / TAU_INFO) * size ** (-1 / TAU_SIZE)
    stay, gone, into = match(tokens, ease, tokens.shape[1] - left)
    weight = worth * size
    weight = weight / add_up(weight, into, left).gather(1, into)  # of each in what it fuses into
    tokens = add_up(weight * tokens, into, left)
    (value,) = project(attn, block.norm1(tokens), slice(split, None))
    read = attn.attn_drop(attention) @ value.take_along_dim(into[:, None], dim=2)
    read = add_up(weight * read.transpose(1, 2).flatten(2), into, left)
    tokens = tokens + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(attn.norm(read)))))
    return tokens, add_up(size, into, left), stay, gone


def fuse_flops(block: nn.Module, count: int, left: int) -> float:
    """FLOPs of a layer that fuses: queries, keys and attention of all, the rest of what is left."""
    qkv = block.attn.qkv
    never = linear_flops(block.attn) - linear_flops(qkv) * 2 / 3
    matched = (count - count // 2) * (count // 2) * (qkv.in_features + 1)
    return block_flops(block, count, left) - (count - left) * never + matched


def fuse_tokens(model: VisionTransformer, r: int) -> TokenReduction:
    """A trained ``model`` in which ``r`` tokens fuse into others in each layer but the first.

    Raises UserError as ``merge_tokens``, and where an adapter makes queries, keys and values.
    """
    fused = TokenReduction(model, leave_by_number(r, first=2), fuse, fuse_flops)
    if any(type(block.attn.qkv) is not nn.Linear for block in model.blocks):
        raise UserError("MCTF computes values apart from keys; merge the adapter of qkv first")
    return fused
