"""Time and memory of models, measured side by side: interleaved, warmed up, repeated; median and spread."""

import gc
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from avit_lib.config import Halting
from avit_lib.losses import AdaptiveLoss, TaskLoss
from avit_lib.models import AViT
from avit_lib.training import autocast

MODELS = ("DeiT", "A-ViT masked", "A-ViT packed")
# Of the synthetic workload: channel 0 lies where no sigmoid is saturated.
SYNTHETIC = dict(gamma=1.0, beta=-8.0, eps=0.01)


@dataclass(frozen=True)
class Workload:
    """A model that halts, the plain one of the same shape, and images whose tokens halt as described."""

    adaptive: AViT
    plain: nn.Module
    images: Tensor
    origin: str

    @torch.inference_mode()
    def describe(self) -> str:
        """Where the halting comes from, and how deep plain inference goes."""
        depth = self.adaptive.eval().forward_with_trace(self.images)[1].executed_depth.float()
        spread = depth.mean(dim=1).std(correction=0)
        layers = len(self.adaptive.blocks)
        return f"{self.origin}: mean depth {depth.mean():.2f} of {layers}, deviation between images {spread:.2f}"


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
    return Workload(adaptive, plain, images, "synthetic halting of an untrained model")


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


# --- the benchmark ----------------------------------------------------------------------------------------------------


def benchmark(workload: Workload, task: str, precision: str, repeats: int, device: torch.device) -> pd.DataFrame:
    """DeiT, masked and packed A-ViT side by side on the images of ``workload``, one row each.

    ``task`` is "inference" or "training" (a whole step: forward, backward, AdamW). Columns: seconds (median over
    repeats), seconds_low and seconds_high (quartiles), images_per_second, gflops_per_image (counted in a packed or
    plain run), speedup and flops_ratio against DeiT, and efficiency = speedup / flops_ratio.
    """
    functions = {name: _step(workload, name, task, precision, device) for name in MODELS}
    samples = interleaved(functions, repeats, device)
    batch = len(workload.images)
    flops = {"DeiT": counted_flops(workload.plain, workload.images[:8].to(device))}
    with torch.inference_mode():
        workload.adaptive.execution = "packed"
        flops["A-ViT packed"] = counted_flops(workload.adaptive, workload.images.to(device))
        workload.adaptive.execution = "masked"
        flops["A-ViT masked"] = flops["DeiT"]
    rows = []
    for name in MODELS:
        low, middle, high = np.percentile(samples[name], (25, 50, 75))
        rows.append({
            "task": task, "precision": precision, "batch": batch, "model": name, "seconds": middle,
            "seconds_low": low, "seconds_high": high, "images_per_second": batch / middle,
            "gflops_per_image": flops[name] / 1e9,
            "speedup": np.median(np.divide(samples["DeiT"], samples[name])), "flops_ratio": flops["DeiT"] / flops[name],
        })  # fmt: skip
    frame = pd.DataFrame(rows)
    return frame.assign(efficiency=frame["speedup"] / frame["flops_ratio"])


def _step(workload: Workload, name: str, task: str, precision: str, device: torch.device) -> Callable[[], None]:
    """A function that does one inference or training step of the model called ``name``."""
    model = (workload.plain if name == "DeiT" else workload.adaptive).to(device)
    images = workload.images.to(device)
    execution = "masked" if name == "A-ViT masked" else "packed"

    def infer() -> None:
        model.execution = execution
        with torch.inference_mode(), autocast(precision, device):
            model.eval()(images)

    if task == "inference":
        return infer
    labels = torch.arange(len(images), device=device) % model.num_classes
    loss = TaskLoss() if name == "DeiT" else AdaptiveLoss(Halting())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)  # steps, but changes nothing

    def train() -> None:
        model.execution = execution
        with autocast(precision, device):
            total = loss(model.train(), images, labels).total
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        optimizer.step()

    return train


def peak_memory(name: str, model: str, batch: int, mean_depth: float, task: str, precision: str) -> float:
    """Peak memory in MiB that steps of ``model`` on a synthetic workload of ``avit_*`` ``name`` add to the process.

    On the CPU, measured in a fresh process: what a process once took from the system it may not give back.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory, (name, model, batch, mean_depth, task, precision))


def _peak_memory(name: str, model: str, batch: int, mean_depth: float, task: str, precision: str) -> float:
    workload = synthetic_workload(name, batch, mean_depth)
    step = _step(workload, model, task, precision, torch.device("cpu"))
    before = _resident()
    for _ in range(3):
        step()
    return (_highest_resident() - before) / 2**20


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _highest_resident() -> int:
    """Bytes; the system counts in KiB, on macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
