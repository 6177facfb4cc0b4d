"""FLOPs of a vision transformer, layer by layer; a multiply-add is one, norms, activations and
softmax are left out.
"""

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def block_flops(
    model: VisionTransformer, attended: float | Tensor, passed: float | Tensor, merges: bool = True
) -> float | Tensor:
    """FLOPs of a layer that attends on ``attended`` tokens, of which ``passed`` reach the MLP:
    numbers, or [n] each.

    With ``merges`` also those of finding who merges: half of the tokens compared with the other
    half by keys averaged over heads, and importance, once the width of each.
    """
    block, width = model.blocks[0], model.embed_dim
    first = block.attn.qkv.weight.numel() + block.attn.proj.weight.numel()
    mlp = sum(layer.weight.numel() for layer in block.mlp.modules() if isinstance(layer, nn.Linear))
    matching = attended**2 / 4 * block.attn.head_dim + attended * width
    return attended * first + 2 * attended**2 * width + passed * mlp + merges * matching


def fixed_flops(model: VisionTransformer) -> float:
    """FLOPs of an image outside of the layers: patch embedding and head."""
    head = model.head.weight.numel() if isinstance(model.head, nn.Linear) else 0
    return float(model.patch_embed.proj.weight.numel() * model.patch_embed.num_patches + head)


def plain_flops(model: VisionTransformer, count: int) -> float:
    """FLOPs of an image of ``count`` tokens none of which merges."""
    return fixed_flops(model) + len(model.blocks) * block_flops(model, count, count, merges=False)
