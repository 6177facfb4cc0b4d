"""FLOPs of vision transformers, predicted and counted; a multiply-add is one, as in the paper.

Predicted layer by layer (DeiT-T: 1.3 G); norms, activations, softmax and a pooling by attention are
left out. A model says itself how deep its tokens go (``forward_with_trace``) and what that costs
(``flops_of``); one that does neither is a plain transformer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class MergingTrace:
    """How deep each token of a batch went before it became part of another, if it ever did."""

    depth: Tensor  # [B, N], integer, 1..L
    halting_scores: Tensor = field(default_factory=partial(torch.zeros, 0))  # there are none


def trace_model(model: nn.Module, images: Tensor) -> tuple[Tensor, Any]:
    """Logits [B, K] of images [B, C, H, W], and a trace that says how deep each token went.

    Its ``depth`` is [B, N], its ``halting_scores`` [B, L, N], or [0] of models that do not halt.
    """
    if hasattr(model, "forward_with_trace"):
        return model.forward_with_trace(images)
    patches = math.prod(model.patch_embed.dynamic_feat_size(images.shape[2:]))
    shape = len(images), patches + model.num_prefix_tokens
    depth = torch.full(shape, len(model.blocks), device=images.device)
    return model(images), MergingTrace(depth)


def flops_of(model: nn.Module, trace: Any) -> Tensor:
    """FLOPs [B] of plain inference on the images of a ``trace``, in float64 on the CPU."""
    if hasattr(model, "flops_of"):
        return model.flops_of(trace)
    return flops_of_depth(model, trace.depth)


def flops_of_depth(
    model: VisionTransformer, depth: Tensor, merging: Sequence[bool] | None = None
) -> Tensor:
    """FLOPs [B] of images whose tokens are computed up to layer ``depth`` [B, N].

    ``merging`` says in which layers tokens merge: they leave there between attention and MLP.
    """
    depth = depth.cpu()
    total = torch.full(depth.shape[:1], fixed_flops(model, depth.shape[1]), dtype=torch.float64)
    merging = merging or [False] * len(model.blocks)
    for layer, (block, merges) in enumerate(zip(model.blocks, merging, strict=True), start=1):
        attended = (depth >= layer).sum(dim=1).double()
        passed = (depth > layer).sum(dim=1).double() if merges else attended
        total += block_flops(block, attended, passed, merges)
    return total


def block_flops(
    block: nn.Module, attended: float | Tensor, passed: float | Tensor, merges: bool = True
) -> float | Tensor:
    """FLOPs of a layer that attends on ``attended`` tokens, of which ``passed`` reach the MLP.

    These are numbers, or [n] each. With ``merges`` also those of finding who merges: half of the
    tokens compared with the other half by keys averaged over heads, and importance, once the width
    of each.
    """
    width = block.attn.num_heads * block.attn.head_dim
    linear = attended * linear_flops(block.attn) + passed * linear_flops(block.mlp)
    matching = attended**2 / 4 * block.attn.head_dim + attended * width
    return linear + 2 * attended**2 * width + merges * matching


def linear_flops(module: nn.Module) -> int:
    """FLOPs of all linear layers in ``module``, for one token; quantised ones count as others."""
    inner = sum(map(linear_flops, module.children()))
    if inner and "weight" not in module._parameters:  # its features are those of a layer inside
        return inner
    return inner + getattr(module, "in_features", 0) * getattr(module, "out_features", 0)


def fixed_flops(model: VisionTransformer, count: int) -> float:
    """FLOPs of an image of ``count`` tokens outside of the layers: patch embedding and head."""
    patches = count - model.num_prefix_tokens
    return float(model.patch_embed.proj.weight.numel() * patches + linear_flops(model.head))


def plain_flops(model: VisionTransformer, count: int) -> float:
    """FLOPs of an image of ``count`` tokens, all of which go through all layers."""
    return flops_of_depth(model, torch.full((1, count), len(model.blocks))).item()


def counted_flops(model: nn.Module, images: Tensor) -> float:
    """FLOPs per image that a forward pass on images [B, C, H, W] performs, by torch's counter."""
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        model(images)
    return counter.get_total_flops() / 2 / len(images)
