"""Accuracy, F1, depth and FLOPs of trained models, with bootstrap confidence intervals."""

from dataclasses import dataclass

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from tqdm.auto import tqdm

from avit_lib import distributed
from avit_lib.config import fitting_memory
from avit_lib.data import Images, loader
from avit_lib.halting import executed_depth
from avit_lib.models import AViT


@dataclass(frozen=True)
class Predictions:
    """What a model said of a data set of n images, on the CPU.

    Shapes: logits [n, K], labels [n], depth [n, N], every token to its own halting, halting_scores [n, L, N]. A plain
    transformer has depth L and score 0 everywhere.
    """

    logits: Tensor
    labels: Tensor
    depth: Tensor
    halting_scores: Tensor
    layers: int

    @property
    def predicted(self) -> Tensor:
        """The class [n] with the highest logit."""
        return self.logits.argmax(dim=1)

    @property
    def correct(self) -> Tensor:
        """Whether the prediction is right, [n] bool."""
        return self.predicted == self.labels


@torch.inference_mode()
def predict(model: nn.Module, data: Images, batch_size: int = 250, device: str | torch.device = "cpu") -> Predictions:
    """Run ``model`` in evaluation mode over ``data``; returns Predictions.

    Each of several processes computes a part of the images and gets the predictions of all, every image once. Raises
    StudyError when memory does not suffice for ``batch_size``.
    """
    device = torch.device(device)
    was_training = model.training
    model.to(device).eval()
    layers, tokens = len(model.blocks), model.patch_embed.num_patches + model.num_prefix_tokens
    own = data if distributed.count() == 1 else data.select(distributed.part(len(data)))
    outputs = []
    with fitting_memory(batch_size, "lower batch_size of predict, or use --device cpu"):
        for images, labels in tqdm(loader(own, batch_size), desc="predicting", unit="batch", leave=False, disable=None):
            if isinstance(model, AViT):
                logits, trace = model.forward_with_trace(images.to(device))
                depth, scores = trace.depth, trace.halting_scores
            else:
                logits = model(images.to(device))
                depth = torch.full((len(images), tokens), layers)
                scores = torch.zeros(len(images), layers, tokens)
            outputs.append((logits.float().cpu(), labels, depth.cpu(), scores.cpu()))
    model.train(was_training)
    parts = (torch.cat(part) for part in zip(*outputs, strict=True))
    return Predictions(*(distributed.gather(part, len(data)) for part in parts), layers)


def flops_per_image(model: VisionTransformer, depth: Tensor) -> Tensor:
    """FLOPs [n] of plain inference on images whose tokens reach ``depth`` [n, N]; masked tokens do not count.

    One multiply-add counts as one FLOP, as in the paper (DeiT-T: 1.3 G); norms, activations and softmax are left out.
    Layer l computes on the n_l tokens whose executed depth is at least l: n_l * (qkv, projection, MLP) + attention
    n_l^2 * 2D. A summary token of halted tokens counts as one token more; where halted tokens merge, so does the
    comparison of those that halt with the patches that go on, D each.
    """
    block = model.blocks[0]
    width = model.embed_dim
    linear = sum(layer.weight.numel() for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2))
    patch = model.patch_embed.proj.weight.numel() * model.patch_embed.num_patches
    head = model.num_classes * width
    executed = executed_depth(depth)
    total = torch.full((len(depth),), float(patch + head), dtype=torch.float64)
    for layer in range(1, len(model.blocks) + 1):
        active = (executed >= layer).sum(dim=1).double()
        if getattr(model, "fuse_halted", False):
            active = active + (active > 0)
        total += active * linear + 2 * active**2 * width
        if getattr(model, "merge_halted", False):
            stay = (executed > layer).sum(dim=1).double()
            total += (active - stay) * (stay - 1).clamp(min=0) * width
    return total


def classification_metrics(predicted: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Accuracy, mean per-class accuracy (over the classes that have images) and macro F1, fractions between 0 and 1."""
    by_class = multiclass_accuracy(predicted, labels, classes, average="none")
    return {
        "accuracy": multiclass_accuracy(predicted, labels, classes, average="micro").item(),
        "accuracy_macro": by_class[labels.unique()].mean().item(),
        "f1_macro": multiclass_f1_score(predicted, labels, classes, average="macro").item(),
    }


def metrics(model: VisionTransformer, predictions: Predictions) -> dict[str, float]:
    """The figures of one model: classification metrics, mean depth in layers, GFLOPs per image."""
    values = classification_metrics(predictions.predicted, predictions.labels, predictions.logits.shape[1])
    values["mean_depth"] = predictions.depth.float().mean().item()
    values["mean_executed_depth"] = executed_depth(predictions.depth).float().mean().item()
    values["gflops_per_image"] = flops_per_image(model, predictions.depth).mean().item() / 1e9
    return values


def _resampled(images: int, resamples: int, seed: int):
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        yield generator.integers(0, images, images)


def _percentiles(values: list[float], level: float) -> tuple[float, float]:
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def bootstrap_intervals(
    predictions: Predictions, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals, over images, of accuracy, accuracy_macro and f1_macro."""
    classes = predictions.logits.shape[1]
    cell = (predictions.labels * classes + predictions.predicted).numpy()
    samples = []
    for chosen in _resampled(len(cell), resamples, seed):
        confusion = np.bincount(cell[chosen], minlength=classes**2).reshape(classes, classes)
        samples.append(_from_confusion(confusion))
    return {name: _percentiles([sample[name] for sample in samples], level) for name in samples[0]}


def _from_confusion(confusion: np.ndarray) -> dict[str, float]:
    hits, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    there = true > 0  # small classes are absent from some resamples: that is no mistake of the model
    met = true + predicted > 0  # as torchmetrics: a class neither there nor predicted does not count
    return {
        "accuracy": hits.sum() / confusion.sum(),
        "accuracy_macro": (hits[there] / true[there]).mean(),
        "f1_macro": (2 * hits[met] / (true + predicted)[met]).mean(),
    }


def paired_difference(
    first: Predictions,
    second: Predictions,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    per_class: bool = False,
) -> tuple[float, float, float]:
    """Accuracy of ``first`` minus that of ``second`` on the same images: difference, low and high end (bootstrap).

    Both models are resampled together, so that what is hard for both cancels. ``per_class`` means mean per-class
    accuracy, as in ``classification_metrics``.
    """
    if not torch.equal(first.labels, second.labels):
        raise ValueError("the two models were evaluated on different images")
    gain = (first.correct.long() - second.correct.long()).numpy()
    labels = first.labels.numpy() if per_class else np.zeros_like(gain)

    def mean(chosen: np.ndarray) -> float:
        images = np.bincount(labels[chosen])
        sums = np.bincount(labels[chosen], weights=gain[chosen])
        return float((sums[images > 0] / images[images > 0]).mean())

    samples = [mean(chosen) for chosen in _resampled(len(gain), resamples, seed)]
    return (mean(np.arange(len(gain))), *_percentiles(samples, level))
