"""FLOPs of a vision transformer, layer by layer; a multiply-add is one, norms, activations and
softmax are left out.
"""

from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from avit_lib.halting import executed_depth


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


@dataclass(frozen=True)
class PlainTrace:
    """What becomes of the tokens of a plain transformer: all reach the last layer."""

    depth: Tensor  # [B, N]
    halting_scores: None = None


def trace_model(model: nn.Module, images: Tensor) -> tuple[Tensor, Any]:
    """Logits [B, K] of images [B, C, H, W] and how deep each token went."""
    if hasattr(model, "forward_with_trace"):
        return model.forward_with_trace(images)
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    depth = torch.full((len(images), tokens), len(model.blocks), device=images.device)
    return model(images), PlainTrace(depth)


def flops_of(model: nn.Module, trace: Any) -> Tensor:
    """FLOPs [B] of plain inference on the images of a trace."""
    if hasattr(model, "flops_of"):
        return model.flops_of(trace)
    model = getattr(model, "model", model)
    executed, layers = executed_depth(trace.depth), len(model.blocks)
    thresholds = model.thresholds.tolist() if hasattr(model, "thresholds") else [torch.inf] * layers
    total = torch.full((len(executed),), fixed_flops(model), dtype=torch.float64)
    for layer, threshold in enumerate(thresholds, start=1):
        merges = threshold < torch.inf
        attended = (executed >= layer).sum(dim=1).double().cpu()
        passed = (executed > layer).sum(dim=1).double().cpu() if merges else attended
        total += block_flops(model, attended, passed, merges)
    return total


def counted_flops(model: nn.Module, images: Tensor) -> float:
    """FLOPs per image that a forward pass on images [B, C, H, W] performs, by torch's counter."""
    with (
        torch.inference_mode(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(images)
    return counter.get_total_flops() / 2 / len(images)
