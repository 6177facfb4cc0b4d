"""FLOPs, predicted from depths and counted by torch; a multiply-add is one, as in the paper (DeiT-T: 1.3 G)."""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from avit_lib.halting import executed_depth


def flops_per_image(model: VisionTransformer, depth: Tensor) -> Tensor:
    """FLOPs [n] of plain inference on images whose tokens reach ``depth`` [n, N]; norms, activations, softmax left out.

    Layer l computes on the n_l tokens whose executed depth is at least l: n_l * (qkv, projection, MLP) + attention
    n_l^2 * 2D.
    """
    block, width = model.blocks[0], model.embed_dim
    linear = sum(layer.weight.numel() for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2))
    fixed = model.patch_embed.proj.weight.numel() * model.patch_embed.num_patches + model.num_classes * width  # + head
    executed = executed_depth(depth)
    total = torch.full((len(depth),), float(fixed), dtype=torch.float64)
    for layer in range(1, len(model.blocks) + 1):
        active = (executed >= layer).sum(dim=1).double()
        total += active * linear + 2 * active**2 * width
    return total


def counted_flops(model: nn.Module, images: Tensor) -> float:
    """FLOPs per image that a forward pass on images [B, C, H, W] really performs, by torch's counter."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() / 2 / len(images)
