"""Token merging (ToMe; Bolya et al., ICLR 2023, arXiv 2210.09461): a peer without training."""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avit_lib.backbone import TokensLeave, check_followed
from avit_lib.errors import UserError
from avit_lib.flops import MergingTrace, block_flops, fixed_flops
from avit_lib.packed import packed_attention, whole_layout


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
    best, partner = similarity.max(dim=2)  # one edge from each token of A
    ranked = best.argsort(dim=1, descending=True)
    gone = ranked[:, :r]
    left = ranked[:, r:].sort(dim=1).values  # of A; they come first, then all of B
    asked = torch.arange(1, keys.shape[1], 2, device=keys.device).expand(len(keys), -1)
    return torch.cat([2 * left, asked], dim=1), 2 * gone, left.shape[1] + partner.gather(1, gone)


def merge(values: Tensor, stay: Tensor, gone: Tensor, target: Tensor) -> Tensor:
    """Sums [B, N - r, C] of values [B, N, C], those of tokens that go added to those they join.

    ``stay``, ``gone`` and ``target`` are as ``match`` returns them.
    """
    joiners = values.take_along_dim(gone[..., None], dim=1)
    kept = values.take_along_dim(stay[..., None], dim=1)
    return kept.scatter_add(1, target[..., None].expand_as(joiners), joiners)


class TokenMerging(nn.Module):
    """A trained VisionTransformer that merges the ``r`` most similar pairs in each layer.

    It shares the weights. With ``step`` 2 it merges in every second layer alone, which the paper
    doesn't try.
    """

    def __init__(self, model: VisionTransformer, r: int, step: int = 1):
        """Raises UserError unless ``model`` is plain, with one class token, and for r < 0."""
        super().__init__()
        plain = type(model) is VisionTransformer and model.has_class_token
        if not plain or model.num_prefix_tokens != 1:
            raise UserError(
                "tokens are merged in a plain vision transformer with one class token; "
                "take a DeiT or ViT"
            )
        if r < 0 or r % 1 or step < 1 or step % 1:
            raise UserError(f"{r} tokens in every {step}th layer cannot merge; take whole numbers")
        self.model, self.blocks = model, model.blocks
        self.numbers = [0 if layer % step else r for layer in range(1, len(model.blocks) + 1)]

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        return self.forward_with_trace(images)[0]

    def forward_with_trace(self, images: Tensor) -> tuple[Tensor, MergingTrace]:
        """Logits [B, K] of images [B, C, H, W], and how deep each token went.

        Of two tokens that merge, that of set A becomes part of that of set B. Raises UserError
        where somebody counts on tokens in their places.
        """
        model = self.model
        check_followed(model)
        tokens = TokensLeave.embed(model, images)
        size = torch.ones_like(tokens[..., :1])  # how many of the first tokens each stands for
        first = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        depth = torch.full_like(first, len(model.blocks))
        for layer, (block, r) in enumerate(zip(model.blocks, self.numbers, strict=True), start=1):
            count = tokens.shape[1]
            layout = whole_layout(len(tokens), count, tokens.device)
            bias = size.log().flatten()  # softmax(q k^T / sqrt(d) + log s) (equation 1)
            tokens, qkv = packed_attention(block, tokens.flatten(0, 1), layout, bias)
            tokens = tokens.unflatten(0, (-1, count))
            if r:
                keys = qkv[:, 1].mean(dim=1).unflatten(0, (-1, count))
                stay, gone, target = match(keys, min(r, (count - 1) // 2))
                sums = merge(tokens * size, stay, gone, target)
                size = merge(size, stay, gone, target)
                tokens = sums / size
                depth.scatter_(1, first.gather(1, gone), layer)
                first = first.gather(1, stay)
            tokens = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
        return model.forward_head(model.norm(tokens)), MergingTrace(depth)

    def flops_of(self, trace: MergingTrace) -> Tensor:
        """FLOPs [B] of the images traced: the same for all, since all merge as many tokens."""
        model, count = self.model, trace.depth.shape[1]
        done = fixed_flops(model, count)
        for block, r in zip(model.blocks, self.numbers, strict=True):
            r = min(r, (count - 1) // 2)  # at most all of set A but the class token
            matching = (count - count // 2) * (count // 2) * block.attn.head_dim  # A with B
            done += block_flops(block, count, count - r, merges=False) + matching * (r > 0)
            count -= r
        return torch.full((len(trace.depth),), done, dtype=torch.float64)
