"""Token merging (ToMe; Bolya et al., ICLR 2023, arXiv 2210.09461): a peer without training."""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avit_lib.backbone import TokensLeave
from avit_lib.errors import UserError
from avit_lib.flops import MergingTrace, block_flops, fixed_flops


def match(keys: Tensor, r: int) -> Tensor:
    """Bipartite soft matching: which of 0..N-r-1 each of the N tokens becomes part of (section 3).

    ``keys`` [B, N, d] are the attention keys, averaged over heads. Returns groups [B, N]: tokens
    with the same number merge. Token 0, the class token, stays alone and first.
    """
    keys = F.normalize(keys, dim=-1)
    first, second = keys[:, ::2], keys[:, 1::2]  # alternate tokens: sets A and B
    similarity = first @ second.transpose(1, 2)  # cosine, [B, |A|, |B|]
    similarity[:, 0] = -torch.inf  # the class token is in A: it asks nobody, and is never asked
    best, partner = similarity.max(dim=2)  # one edge from each token of A
    merges = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(r, dim=1).indices, True)
    kept = first.shape[1] - r  # those of A that stay come first, then B
    groups = torch.empty(keys.shape[:2], dtype=torch.long, device=keys.device)
    groups[:, ::2] = torch.where(merges, kept + partner, (~merges).cumsum(dim=1) - 1)
    groups[:, 1::2] = kept + torch.arange(second.shape[1], device=keys.device)
    return groups


def merge(tokens: Tensor, size: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean [B, count, D] of each group of tokens [B, N, D], and the sum of ``size`` [B, N].

    The mean is weighted by size.
    """
    images, _, width = tokens.shape
    rows = (groups + count * torch.arange(images, device=groups.device)[:, None]).flatten()
    weighted = (tokens * size[..., None]).flatten(0, 1)
    total = weighted.new_zeros(images * count, width).index_add(0, rows, weighted)
    size = size.new_zeros(images * count).index_add(0, rows, size.flatten())
    means = (total / size[:, None]).to(tokens.dtype)
    return means.view(images, count, width), size.view(images, count)


def attend(module: nn.Module, tokens: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """timm's Attention on tokens [B, N, D], each key counted ``size`` [B, N] times (equation 1).

    Returns its output, and the keys [B, N, d], averaged over heads.
    """
    qkv = module.qkv(tokens).unflatten(-1, (3, module.num_heads, module.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, d] each
    q, k = module.q_norm(q), module.k_norm(k)
    weight = size.log().to(q.dtype)[:, None, None, :]  # softmax(q k^T / sqrt(d) + log s)
    dropout = module.attn_drop.p if module.training else 0.0
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=weight, dropout_p=dropout)
    attended = module.norm(attended.transpose(1, 2).flatten(2))
    return module.proj_drop(module.proj(attended)), k.mean(dim=1)


def limit(r: int, count: int) -> int:
    """How many of ``count`` tokens a layer merges: at most all of set A but the class token."""
    return min(r, (count - 1) // 2)


def merging_block(
    block: nn.Module, tokens: Tensor, size: Tensor, r: int
) -> tuple[Tensor, Tensor, Tensor]:
    """timm's Block with merging between attention and MLP; N tokens enter, N - r leave.

    Returns these tokens [B, N - r, D], their sizes, and the groups [B, N] that made them.
    """
    attended, keys = attend(block.attn, block.norm1(tokens), size)
    tokens = tokens + block.drop_path1(block.ls1(attended))
    r = limit(r, tokens.shape[1])
    groups = match(keys, r)
    tokens, size = merge(tokens, size, groups, tokens.shape[1] - r)
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))), size, groups


def run_merging(blocks: nn.Sequential, tokens: Tensor, r: int) -> tuple[Tensor, Tensor, list]:
    """All blocks on embedded tokens [B, N, D]: tokens [B, M, D], sizes [B, M], and all groups."""
    size, layers = torch.ones_like(tokens[..., 0]), []
    for block in blocks:
        tokens, size, groups = merging_block(block, tokens, size, r)
        layers.append(groups)
    return tokens, size, layers


def find_depth(layers: list[Tensor], tokens: Tensor) -> Tensor:
    """The layer [B, N] in which each of the first ``tokens`` [B, N, D] became part of another.

    L for those that never did. ``layers`` are the groups of each; of two tokens that merge, that of
    set A joins that of set B.
    """
    depth = torch.full(tokens.shape[:2], len(layers), device=tokens.device)
    first = torch.arange(depth.shape[1], device=depth.device).expand_as(depth)  # who is left
    for layer, groups in enumerate(layers, start=1):
        left = torch.empty_like(first)
        for start in (0, 1):  # set A, then B in its place
            left.scatter_(1, groups[:, start::2], first[:, start::2])
        joins = left.gather(1, groups) != first
        depth.scatter_(1, first, depth.gather(1, first).masked_fill(joins, layer))
        first = left[:, : groups.max() + 1]
    return depth


class TokenMerging(nn.Module):
    """A trained VisionTransformer that merges the ``r`` most similar pairs in each layer.

    It shares the weights.
    """

    def __init__(self, model: VisionTransformer, r: int):
        """Raises UserError unless ``model`` is plain, with one class token, and for r < 0."""
        super().__init__()
        plain = isinstance(model, VisionTransformer) and not isinstance(model, TokensLeave)
        if not (plain and model.has_class_token and model.num_prefix_tokens == 1):
            raise UserError(
                "tokens are merged in a plain vision transformer with one class token; "
                "take a DeiT or ViT"
            )
        if r < 0:
            raise UserError(f"a layer cannot merge {r} tokens; choose r = 0 or more")
        self.model, self.r, self.blocks = model, r, model.blocks

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        return self._run(images)[0]

    def forward_with_trace(self, images: Tensor) -> tuple[Tensor, MergingTrace]:
        """Logits [B, K] of images [B, C, H, W], and how deep each token went."""
        logits, tokens, layers = self._run(images)
        return logits, MergingTrace(find_depth(layers, tokens))

    def flops_of(self, trace: MergingTrace) -> Tensor:
        """FLOPs [B] of the images traced: the same for all, since all merge as many tokens."""
        model, count = self.model, trace.depth.shape[1]
        done = fixed_flops(model)
        for block in model.blocks:
            r = limit(self.r, count)
            matching = (count - count // 2) * (count // 2) * block.attn.head_dim  # A with B
            done += matching + block_flops(block, count, count - r, merges=False)
            count -= r
        return torch.full((len(trace.depth),), done, dtype=torch.float64)

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits, the first tokens [B, N, D], and the groups of each layer."""
        model = self.model
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        merged, _, layers = run_merging(model.blocks, tokens, self.r)
        return model.forward_head(model.norm(merged)), tokens, layers
