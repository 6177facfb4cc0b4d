"""Time and memory of models, measured side by side: interleaved, warmed up, repeated; median and spread."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from avit_lib.config import Halting

from avit_lib.halting import executed_depth
from avit_lib.models import AViT
from avit_lib.training import autocast

SYNTHETIC = dict(gamma=1.0, beta=-8.0, eps=0.01)


@dataclass(frozen=True)
class Workload:
    """A model that halts, the plain one of the same shape, and images whose tokens halt as described."""

    adaptive: AViT
    plain: nn.Module
    images: Tensor
    depth: Tensor  # [B, N] of the adaptive model on these images
    description: str


def synthetic_workload(
    name: str, batch: int, mean_depth: float, image_spread: float = 1.5, token_spread: float = 2.0, seed: int = 0
) -> Workload:
    """An untrained ``avit_*`` whose patches halt around ``mean_depth``, differently in every image.

    No block writes to channel 0, so a token keeps the score that its patch's brightness gives it, and the images are
    made of the brightness that halts each patch in the layer drawn for it: image means deviate by ``image_spread``
    layers, patches within an image by ``token_spread``. The class token runs to the last layer.
    """
    generator = torch.Generator().manual_seed(seed)
    adaptive = timm.create_model(name, **SYNTHETIC).eval()
    plain = timm.create_model(name.replace("avit", "deit")).eval()
    layers, grid = len(adaptive.blocks), adaptive.patch_embed.grid_size
    with torch.no_grad():
        for block in adaptive.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight[0], layer.bias[0] = 0.0, 0.0
        patch = adaptive.patch_embed.proj
        patch.weight[0], patch.bias[0] = 1 / patch.weight[0].numel(), 0.0
        adaptive.pos_embed[..., 0], adaptive.cls_token[..., 0] = 0.0, -100.0
    means = mean_depth + image_spread * torch.randn(batch, 1, 1, 1, generator=generator)
    drawn = means + token_spread * torch.randn(batch, 1, *grid, generator=generator)
    drawn = drawn + (mean_depth - drawn.mean())
    halts = drawn.round().clamp(1, layers)
    score = (1 - adaptive.eps) / (halts - 0.5)  # its multiple passes 1 - eps in layer ``halts``
    score = torch.where(halts == 1, torch.tensor(0.9999), score).clamp(max=0.9999)
    channel = (torch.logit(score) - adaptive.beta) / adaptive.gamma
    size = adaptive.patch_embed.patch_size
    images = channel.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)
    images = images.expand(-1, adaptive.in_chans, -1, -1).contiguous()
    return _workload(adaptive, plain, images, "synthetic halting")


def trained_workload(adaptive: AViT, plain: nn.Module, images: Tensor) -> Workload:
    """A trained pair of models on real images."""
    return _workload(adaptive.eval(), plain.eval(), images, "trained model, real images")


@torch.inference_mode()
def _workload(adaptive: AViT, plain: nn.Module, images: Tensor, what: str) -> Workload:
    depth = adaptive.forward_with_trace(images)[1].depth
    executed = executed_depth(depth).float()
    described = f"{what}: mean executed depth {executed.mean():.2f} of {len(adaptive.blocks)} layers"
    if len(images) > 1:
        described += f", deviation between images {executed.mean(dim=1).std():.2f}"
    return Workload(adaptive, plain, images, depth, described)


def counted_flops(model: nn.Module, images: Tensor) -> float:
    """FLOPs per image that a forward pass really performs, by torch's counter; a multiply-add counts as one."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() / 2 / len(images)


def interleaved(
    functions: dict[str, Callable[[], None]], repeats: int, device: torch.device, minimum: float = 0.2
) -> dict[str, list[float]]:
    """Seconds of each call of ``functions``, taken in turns so that a drift of the machine hits all alike.

    Each is warmed up twice; a sample is the mean of as many calls as fill ``minimum`` seconds.
    """
    calls = {}
    for name, function in functions.items():
        _timed(function, 1, device)
        calls[name] = max(1, round(minimum / _timed(function, 1, device)))
    samples = {name: [] for name in functions}
    for _ in tqdm(range(repeats), desc="timing", unit="round", leave=False, disable=None):
        for name, function in functions.items():
            samples[name].append(_timed(function, calls[name], device))
    return samples


def _timed(function: Callable[[], None], calls: int, device: torch.device) -> float:
    gc.collect()
    _synchronise(device)
    started = time.perf_counter()
    for _ in range(calls):
        function()
    _synchronise(device)
    return (time.perf_counter() - started) / calls


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
