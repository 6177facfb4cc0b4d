"""Adaptive token sampling (ATS; Fayyaz et al., ECCV 2022, arXiv 2111.15667).

Each image keeps its own number of patches. Unlike in the paper, where the sampled tokens alone are
queries in a layer that samples, all tokens attend there; those that were not sampled leave between
attention and MLP, as with the other peers. Shares follow the paper's equation; the authors' code
sums attention over heads before it multiplies by the norm of the value, sorts the shares before it
adds them up, and takes the tokens nearest to its marks. It never has more marks than tokens.
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from avit_lib.backbone import attend_as_class
from avit_lib.errors import UserError
from avit_lib.flops import MergingTrace, flops_of_depth
from avit_lib.packed import (
    packed_attention,
    packed_mlp,
    split_off,
    to_dense,
    to_packed,
    whole_layout,
)
from avit_lib.peers.pruning import rate_flops
from avit_lib.peers.reduction import Peer


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


class TokenSampling(Peer):
    """A peer that goes on with the patches it samples.

    It samples at most ``most`` in each of layers 4 to 11 of 12: all after the first quarter but the
    last, after which no patch is read. The choice has no gradient; what stays has.
    """

    def __init__(self, model: VisionTransformer, most: int):
        """Raises UserError unless ``most`` is 1, 2, ..., and as ``Peer``."""
        super().__init__(model)
        if most < 1 or most % 1:
            raise UserError(f"{most} patches cannot be sampled; take a whole number from 1 on")
        self.most, layers = most, len(model.blocks)
        self.samples = [layers // 4 < layer < layers for layer in range(1, layers + 1)]

    def compute(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """All layers on embedded tokens [B, N, D]; of what is left, the class tokens [B, 1, D]."""
        images, count, _ = tokens.shape
        layout = whole_layout(images, count, tokens.device)
        depth, tokens = torch.empty_like(layout.index), tokens.flatten(0, 1)
        for layer, (block, samples) in enumerate(zip(self.blocks, self.samples, strict=True)):
            depth[layout.index] = layer + 1
            tokens, qkv = packed_attention(block, tokens, layout)
            if samples:
                hit = [sample(table, self.most) for table in to_dense(qkv, layout)]
                layout, stay = split_off(layout, to_packed(hit))
                tokens = tokens if stay is None else tokens.index_select(0, stay)
            tokens = packed_mlp(block, tokens, layout)
        return tokens[layout.starts[layout.images.argsort()], None], depth.view(images, count)

    def flops_of(self, trace: MergingTrace) -> Tensor:
        """FLOPs [B] of the images traced."""
        return flops_of_depth(self.model, trace.depth, self.samples, rate_flops)
