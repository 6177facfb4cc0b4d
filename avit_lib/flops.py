"""FLOPs of vision transformers, predicted and counted; a multiply-add is one, as in the paper.

Predicted layer by layer (DeiT-T: 1.3 G); norms, activations, softmax and a pooling by attention are
left out. A model says itself how deep its tokens go (``forward_with_trace``) and what that costs
(``flops_of``); one that does neither is a plain transformer.
"""

import math
from collections.abc import Callable, Sequence
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


def block_flops(
    block: nn.Module, attended: float | Tensor, passed: float | Tensor
) -> float | Tensor:
    """FLOPs of a layer that attends on ``attended`` tokens, of which ``passed`` reach the MLP.

    These are numbers, or [n] each.
    """
    width = block.attn.proj.in_features
    linear = attended * linear_flops(block.attn) + passed * linear_flops(block.mlp)
    return linear + 2 * attended**2 * width


def matching_flops(block: nn.Module, attended: float | Tensor) -> float | Tensor:
    """FLOPs of finding who of ``attended`` tokens merges.

    Half of the tokens are compared with the other half by keys averaged over heads, and importance
    is once the width of each.
    """
    width = block.attn.num_heads * block.attn.head_dim
    return attended**2 / 4 * block.attn.head_dim + attended * width


def flops_of_depth(
    model: VisionTransformer,
    depth: Tensor,
    leaving: Sequence[bool] | None = None,
    choice_flops: Callable = matching_flops,
) -> Tensor:
    """FLOPs [B] of images whose tokens are computed up to layer ``depth`` [B, N].

    ``leaving`` says in which layers tokens leave between attention and MLP, and ``choice_flops`` of
    a block and its tokens what it costs to choose them.
    """
    depth = depth.cpu()
    total = torch.full(depth.shape[:1], fixed_flops(model, depth.shape[1]), dtype=torch.float64)
    leaving = leaving or [False] * len(model.blocks)
    for layer, (block, leaves) in enumerate(zip(model.blocks, leaving, strict=True), start=1):
        attended = (depth >= layer).sum(dim=1).double()
        passed = (depth > layer).sum(dim=1).double() if leaves else attended
        chosen = choice_flops(block, attended) if leaves else 0
        total += block_flops(block, attended, passed) + chosen
    return total


def linear_flops(module: nn.Module) -> int:
    """FLOPs of all linear layers in ``module``, for one token; quantised ones count as others."""
    inner = sum(map(linear_flops, module.children()))
    if inner and "weight" not in module._parameters:  # its features are those of a layer inside
        return inner
    return inner + getattr(module, "in_features", 0) * getattr(module, "out_features", 0)


def fixed_flops(model: VisionTransformer, count: int) -> float:
    """FLOPs of an image of ``count`` tokens outside of the layers: patch embedding and head."""
    patches = count - model.num_prefix_tokens
    heads = linear_flops(model.head) + linear_flops(getattr(model, "head_dist", nn.Identity()))
    return float(model.patch_embed.proj.weight.numel() * patches + heads)


def plain_flops(model: VisionTransformer, count: int) -> float:
    """FLOPs of an image of ``count`` tokens, all of which go through all layers."""
    return flops_of_depth(model, torch.full((1, count), len(model.blocks))).item()


def counted_flops(model: nn.Module, images: Tensor) -> float:
    """FLOPs per image that a forward pass on images [B, C, H, W] performs, by torch's counter."""
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        model(images)
    return counter.get_total_flops() / 2 / len(images)
