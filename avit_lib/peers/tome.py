"""Token merging (ToMe; Bolya et al., ICLR 2023, arXiv 2210.09461): the peer of A-ViT that needs no
training.
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avit_lib.errors import UserError
from avit_lib.model import AViT


def match(keys: Tensor, r: int) -> Tensor:
    """Bipartite soft matching: which of the merged tokens, 0..N-r-1, each of the N tokens becomes
    part of (section 3).

    ``keys`` [B, N, d] are the attention keys, averaged over heads. Returns groups [B, N]: tokens
    with the same number merge. Token 0, the class token, stays alone and first.
    """
    keys = F.normalize(keys, dim=-1)
    first, second = keys[:, ::2], keys[:, 1::2]  # alternate tokens: sets A and B
    similarity = first @ second.transpose(1, 2)  # cosine, [B, |A|, |B|]
    similarity[
        :, 0
    ] = -torch.inf  # the class token is in A, where it asks for nobody, and so is never asked
    best, partner = similarity.max(dim=2)  # one edge from each token of A
    merges = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(r, dim=1).indices, True)
    kept = first.shape[1] - r  # those of A that stay come first, then B
    groups = torch.empty(keys.shape[:2], dtype=torch.long, device=keys.device)
    groups[:, ::2] = torch.where(merges, kept + partner, (~merges).cumsum(dim=1) - 1)
    groups[:, 1::2] = kept + torch.arange(second.shape[1], device=keys.device)
    return groups


def merge(tokens: Tensor, size: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean [B, count, D] of each group of tokens [B, N, D], weighted by ``size`` [B, N], and
    the sum of sizes.
    """
    images, _, width = tokens.shape
    rows = (groups + count * torch.arange(images, device=groups.device)[:, None]).flatten()
    weighted = (tokens * size[..., None]).flatten(0, 1)
    total = (
        weighted.new_zeros(images * count, width)
        .index_add(0, rows, weighted)
        .unflatten(0, (images, count))
    )
    size = (
        size.new_zeros(images * count)
        .index_add(0, rows, size.flatten())
        .unflatten(0, (images, count))
    )
    return (total / size[..., None]).to(tokens.dtype), size


def attend(module: nn.Module, tokens: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """timm's Attention on tokens [B, N, D], each key counted ``size`` [B, N] times (equation 1);
    returns keys, too.
    """
    qkv = module.qkv(tokens).unflatten(-1, (3, module.num_heads, module.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, d] each
    q, k = module.q_norm(q), module.k_norm(k)
    weight = size.log().to(q.dtype)[:, None, None, :]  # softmax(q k^T / sqrt(d) + log s)
    dropout = module.attn_drop.p if module.training else 0.0
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=weight, dropout_p=dropout)
    return module.proj_drop(module.proj(module.norm(attended.transpose(1, 2).flatten(2)))), k.mean(
        dim=1
    )  # [B, N, d]


def merging_block(block: nn.Module, tokens: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """timm's Block with merging between attention and MLP: tokens [B, N, D], size [B, N] -> the
    same with N - r.
    """
    attended, keys = attend(block.attn, block.norm1(tokens), size)
    tokens = tokens + block.drop_path1(block.ls1(attended))
    r = min(r, (tokens.shape[1] - 1) // 2)  # at most all of set A but the class token
    if r > 0:
        tokens, size = merge(tokens, size, match(keys, r), tokens.shape[1] - r)
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))), size


def run_merging(blocks: nn.Sequential, tokens: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """All blocks on embedded tokens [B, N, D]: returns the merged tokens [B, M, D] and their sizes
    [B, M].
    """
    size = torch.ones_like(tokens[..., 0])
    for block in blocks:
        tokens, size = merging_block(block, tokens, size, r)
    return tokens, size


class TokenMerging(nn.Module):
    """A trained VisionTransformer that merges the ``r`` most similar pairs in each layer; it shares
    the weights.
    """

    def __init__(self, model: VisionTransformer, r: int):
        """Raises UserError for a model that halts or has no class token alone before its patches,
        and for r < 0.
        """
        super().__init__()
        plain = isinstance(model, VisionTransformer) and not isinstance(model, AViT)
        if not (plain and model.has_class_token and model.num_prefix_tokens == 1):
            raise UserError(
                "tokens are merged in a plain vision transformer with one class token; take a DeiT or ViT"
            )
        if r < 0:
            raise UserError(
                f"the number of tokens to merge in each layer must not be negative: {r}"
            )
        self.model, self.r = model, r
        self.blocks, self.patch_embed, self.num_prefix_tokens = (
            model.blocks,
            model.patch_embed,
            1,
        )  # for ``predict``

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        model = self.model
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return model.forward_head(model.norm(run_merging(model.blocks, tokens, self.r)[0]))
