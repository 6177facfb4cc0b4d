"""Adaptive token sampling (ATS; Fayyaz et al., ECCV 2022, arXiv 2111.15667).

Each image keeps its own number of patches. Unlike in the paper, where the sampled tokens alone are
queries in a layer that samples, all tokens attend there; those that were not sampled leave between
attention and MLP, as with the other peers.
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avit_lib.backbone import TokensLeave, attend_as_class, check_followed
from avit_lib.errors import UserError
from avit_lib.flops import MergingTrace, flops_of_depth, linear_flops
from avit_lib.packed import (
    packed_attention,
    packed_mlp,
    split_off,
    to_dense,
    to_packed,
    whole_layout,
)
from avit_lib.peers.pruning import rate_flops
from avit_lib.peers.reduction import check_plain


def sample(qkv: Tensor, most: int) -> Tensor:
    """Which tokens stay [B, N], bool: the class token, and at most ``most`` = K of the patches.

    A patch counts by what the class token takes from it, as a share of what it takes from all. The
    shares are added up in the order of the patches; each of the K quantiles (2 k - 1) / 2 K,
    k = 1..K, hits the patch in whose share it lies. ``qkv`` is [B, N, 3, heads, d].
    """
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, N, d]
    unbiased = torch.zeros(1, 1, device=qkv.device)  # in float32, and so is what follows
    taken = attend_as_class(query, key, value, unbiased)
    taken[:, 0] = 0
    end = taken.cumsum(dim=1)
    passed = (most * end / end[:, -1:] + 0.5).floor()  # quantiles up to the end of each share
    return F.pad(passed, (1, 0), value=-1).diff(dim=1) > 0  # from -1 to 0: the class token


class TokenSampling(nn.Module):
    """A trained model, whose weights it shares, that goes on with the patches it samples.

    It samples at most ``most`` in each of layers 4 to 11 of 12: all after the first quarter but the
    last, after which no patch is read. The choice has no gradient; what stays has.
    """

    def __init__(self, model: VisionTransformer, most: int):
        """Raises UserError unless ``most`` is 1, 2, ..., and as ``check_plain``."""
        super().__init__()
        check_plain(model)
        if most < 1 or most % 1:
            raise UserError(f"{most} patches cannot be sampled; take a whole number from 1 on")
        self.model, self.blocks, self.most = model, model.blocks, most
        self.layers = range(1 + len(model.blocks) // 4, len(model.blocks))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        return self.forward_with_trace(images)[0]

    def forward_with_trace(self, images: Tensor) -> tuple[Tensor, MergingTrace]:
        """Logits [B, K] of images [B, C, H, W], and how deep each token went.

        Raises UserError where somebody counts on tokens in their places.
        """
        model = self.model
        check_followed(model)
        tokens = TokensLeave.embed(model, images)
        layout = whole_layout(len(images), tokens.shape[1], tokens.device)
        depth, tokens = torch.empty_like(layout.index), tokens.flatten(0, 1)
        for layer, block in enumerate(model.blocks, start=1):
            depth[layout.index] = layer
            tokens, qkv = packed_attention(block, tokens, layout)
            if layer in self.layers:
                hit = [sample(table, self.most) for table in to_dense(qkv, layout)]
                layout, stay = split_off(layout, to_packed(hit))
                tokens = tokens if stay is None else tokens.index_select(0, stay)
            tokens = packed_mlp(block, tokens, layout)
        answers = tokens[layout.starts[layout.images.argsort()], None]  # the class tokens
        return model.forward_head(model.norm(answers)), MergingTrace(depth.view(len(images), -1))

    def flops_of(self, trace: MergingTrace) -> Tensor:
        """FLOPs [B] of the images traced."""
        depth, block = trace.depth.cpu(), self.blocks[0]  # all blocks have one shape
        rated = sum((depth >= layer).sum(dim=1) for layer in self.layers)
        spared = (depth < len(self.blocks)).sum(dim=1) * linear_flops(block.mlp)  # one MLP each
        return flops_of_depth(self.model, depth) + rate_flops(block, rated) - spared
