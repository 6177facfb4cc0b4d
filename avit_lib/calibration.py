"""Where halting starts: beta such that a backbone that never halted does so at a depth of one's choice.

A fixed beta fits only backbones whose channel 0 is spread like that of the one it was found for. Too low, and epochs
pass before anything halts; too high, and the first steps tear a trained backbone apart.
"""

from copy import deepcopy

import torch
from torch import Tensor

from avit_lib.config import StudyError
from avit_lib.models import AViT


@torch.inference_mode()
def mean_depth(model: AViT, images: Tensor) -> float:
    """Mean depth in layers over all tokens of images [B, C, H, W], every token to its own halting."""
    return model.forward_with_trace(images)[1].depth.float().mean().item()


def calibrated_beta(
    model: AViT, images: Tensor, gamma: float, eps: float, wish: float, tolerance: float = 0.05
) -> float:
    """The beta, by bisection, with which ``model`` reaches a mean depth of ``wish`` layers on images [B, C, H, W].

    Stops within ``tolerance`` layers of the wish, or where the depth jumps over it; the model is left as it is. Raises
    StudyError unless the wish lies between the first layer and the last.
    """
    layers = len(model.blocks)
    if not 1 < wish < layers:
        raise StudyError(f"a mean depth of {wish} is out of reach; choose one between 1 and {layers} layers")
    probe = deepcopy(model).eval()
    probe.gamma, probe.eps = gamma, eps

    def depth(beta: float) -> float:
        probe.beta = beta
        return mean_depth(probe, images)

    low, high = -1.0, 1.0  # the higher beta, the sooner tokens halt
    while depth(low) < wish:
        low *= 2
    while depth(high) > wish:
        high *= 2
    while high - low > 1e-4 * max(1.0, abs(low)):
        beta = (low + high) / 2
        found = depth(beta)
        if abs(found - wish) <= tolerance:
            return beta
        low, high = (beta, high) if found > wish else (low, beta)
    return low  # on the deeper side of a jump: less is lost
