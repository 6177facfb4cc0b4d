"""A trained VisionTransformer of which tokens leave in some layers: what the peers have in common.

They leave before the MLP. Where equally many leave in every image, a peer is three functions: how
many are left, what attends and who leaves, and what a layer costs in which some leave.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avit_lib.backbone import TokensLeave, check_followed, is_hooked
from avit_lib.errors import UserError
from avit_lib.flops import MergingTrace, block_flops, fixed_flops
from avit_lib.packed import packed_attention, packed_mlp, whole_layout


class Peer(nn.Module):
    """A trained model, whose weights it shares, in which tokens leave.

    Its subclasses say how, by ``compute`` of the embedded tokens [B, N, D]: the tokens [B, M, D]
    that are left, the class token first, and the depth [B, N] of all.
    """

    def __init__(self, model: VisionTransformer):
        """Raises UserError unless ``model`` is plain, and answers by its one class token."""
        super().__init__()
        plain = type(model) is VisionTransformer and model.global_pool == "token"
        changed = {"forward", "forward_features"} & vars(model).keys() or is_hooked(model)
        if not plain or model.num_prefix_tokens != 1 or changed:
            raise UserError(
                "a peer takes a plain vision transformer that answers by its one class token, with "
                "timm's own forward and without hooks: a DeiT or ViT"
            )
        self.model = model

    @property
    def blocks(self) -> nn.Module:
        """The layers of the model; not registered again, or a state dict had each weight twice."""
        return self.model.blocks

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        return self.forward_with_trace(images)[0]

    def forward_with_trace(self, images: Tensor) -> tuple[Tensor, MergingTrace]:
        """Logits [B, K] of images [B, C, H, W], and how deep each token went.

        Raises UserError where somebody counts on tokens in their places.
        """
        model = self.model
        check_followed(model)
        if is_hooked(model) or is_hooked(model.norm):
            raise UserError(
                "a hook on the model or its norm is not called, or lacks tokens; hook the peer"
            )
        tokens, depth = self.compute(TokensLeave.embed(model, images))
        return model.forward_head(model.norm(tokens)), MergingTrace(depth)


def attend_all(block: nn.Module, tokens: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens [B, N, D] of sizes [B, N, 1] (None: one each) after the attention of a block.

    Returns also queries, keys and values [B, N, 3, heads, d].
    """
    images, count, _ = tokens.shape
    layout = whole_layout(images, count, tokens.device)
    bias = None if size is None else size.log().flatten()
    tokens, qkv = packed_attention(block, tokens.flatten(0, 1), layout, bias)
    return tokens.unflatten(0, (images, count)), qkv.unflatten(0, (images, count))


class TokenReduction(Peer):
    """A peer in which equally many tokens leave in every image.

    ``count_left`` of a layer, 1..L, and its number of tokens: how many are left.
    ``reduce`` of a block, the tokens [B, N, D] that enter it, sizes [B, N, 1] (how many tokens each
    stands for; None: one each), and how many shall be left: the new tokens after attention, their
    sizes, the places of those that stay, in their new order (N for one that is made of others), and
    of those that leave.
    ``reducing_flops`` of a block, its number of tokens, and how many are left: what all that and
    the MLP cost.
    """

    def __init__(
        self,
        model: VisionTransformer,
        count_left: Callable[[int, int], int],
        reduce: Callable,
        reducing_flops: Callable[[nn.Module, int, int], float],
    ):
        """Raises UserError as ``Peer``."""
        super().__init__(model)
        self.count_left, self.reduce, self.reducing_flops = count_left, reduce, reducing_flops

    def compute(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """All layers on embedded tokens [B, N, D]."""
        images, whole, _ = tokens.shape
        size = None
        first = torch.arange(whole, device=tokens.device).expand(images, -1)
        # One more column, for all tokens that are made.
        depth = F.pad(torch.full_like(first, len(self.blocks)), (0, 1))
        for layer, block in enumerate(self.blocks, start=1):
            count = tokens.shape[1]
            left = self.count_left(layer, count)
            if left < count:
                tokens, size, stay, gone = self.reduce(block, tokens, size, left)
                depth.scatter_(1, first.gather(1, gone), layer)
                first = F.pad(first, (0, 1), value=whole).gather(1, stay)
            else:
                tokens, _ = attend_all(block, tokens, size)
            layout = whole_layout(images, left, tokens.device)
            tokens = packed_mlp(block, tokens.flatten(0, 1), layout).unflatten(0, (images, -1))
        return tokens, depth[:, :whole]

    def flops_of(self, trace: MergingTrace) -> Tensor:
        """FLOPs [B] of the images traced: the same for all, since as many tokens leave."""
        count = trace.depth.shape[1]
        done = fixed_flops(self.model, count)
        for layer, block in enumerate(self.blocks, start=1):
            left = self.count_left(layer, count)
            done += (self.reducing_flops if left < count else block_flops)(block, count, left)
            count = left
        return torch.full((len(trace.depth),), done, dtype=torch.float64)
