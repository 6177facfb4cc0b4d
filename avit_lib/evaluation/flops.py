"""FLOPs, predicted from depths and counted by torch; a multiply-add is one, as in the paper
(DeiT-T: 1.3 G).
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from avit_lib.adaptive import Adaptive
from avit_lib.flops import block_flops, fixed_flops
from avit_lib.halting import executed_depth


def flops_per_image(model: VisionTransformer, depth: Tensor) -> Tensor:
    """FLOPs [n] of plain inference on images whose tokens reach ``depth`` [n, N]; norms,
    activations, softmax left out.

    Layer l computes on the tokens whose executed depth is at least l. One that merges there
    (``Adaptive``) does so between attention and MLP.
    """
    executed, layers = executed_depth(depth), len(model.blocks)
    thresholds = model.thresholds.tolist() if isinstance(model, Adaptive) else [torch.inf] * layers
    total = torch.full((len(depth),), fixed_flops(model), dtype=torch.float64)
    for layer, threshold in enumerate(thresholds, start=1):
        merges = threshold < torch.inf
        attended = (executed >= layer).sum(dim=1).double()
        passed = (executed > layer).sum(dim=1).double() if merges else attended
        total += block_flops(model, attended, passed, merges)
    return total


def counted_flops(model: nn.Module, images: Tensor) -> float:
    """FLOPs per image that a forward pass on images [B, C, H, W] really performs, by torch's
    counter.
    """
    with (
        torch.inference_mode(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(images)
    return counter.get_total_flops() / 2 / len(images)
