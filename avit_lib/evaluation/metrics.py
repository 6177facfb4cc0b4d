"""Accuracy, F1, depth and FLOPs of trained models, with bootstrap confidence intervals."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn
from tqdm.auto import tqdm

from avit_lib.backbone import evaluating
from avit_lib.data import Images, loader
from avit_lib.errors import fitting_memory
from avit_lib.flops import flops_of, trace_model
from avit_lib.halting import executed_depth


@dataclass(frozen=True)
class Predictions:
    """What a model said of a data set of n images, on the CPU."""

    logits: Tensor  # [n, K]
    labels: Tensor  # [n]
    depth: Tensor  # [n, N], every token to its own end; of a plain transformer L everywhere
    halting_scores: Tensor  # [n, L, N]; [0]: the model does not halt
    flops: Tensor  # [n], of plain inference
    layers: int  # L

    @property
    def predicted(self) -> Tensor:
        """The class [n] with the highest logit."""
        return self.logits.argmax(dim=1)

    @property
    def correct(self) -> Tensor:
        """Whether the prediction is right, [n] bool."""
        return self.predicted == self.labels

    @property
    def mean_depth(self) -> Tensor:
        """Mean depth [n] over the tokens of each image, in layers."""
        return self.depth.float().mean(dim=1)


@torch.inference_mode()
def predict(
    model: nn.Module, data: Images, batch_size: int = 250, device: str | torch.device = "cpu"
) -> Predictions:
    """Run ``model`` in evaluation mode over ``data``.

    Raises UserError when memory is too small for ``batch_size``.
    """
    model.to(device)
    batches = loader(data, batch_size)
    bar = tqdm(batches, desc="predicting", unit="batch", leave=False, disable=None)
    parts = []
    remedy = "lower batch_size of predict, or use --device cpu"
    with evaluating(model), fitting_memory(batch_size, remedy):
        for images, labels in bar:
            logits, trace = trace_model(model, images.to(device))
            followed = trace.depth, trace.halting_scores, flops_of(model, trace)
            parts.append([one.cpu() for one in (logits.float(), labels, *followed)])
    joined = (torch.cat(part) for part in zip(*parts, strict=True))
    return Predictions(*joined, len(model.blocks))


def metrics(predictions: Predictions) -> dict[str, float]:
    """The figures of one model: accuracies and F1 (0 to 1), depths in layers, GFLOPs per image.

    ``accuracy_macro`` is the mean over the classes that have images, ``f1_macro`` over those that
    have images or are predicted.
    """
    cells, classes = _cells(predictions)
    return _accuracies(cells, classes) | {
        "mean_depth": predictions.depth.float().mean().item(),
        "mean_executed_depth": executed_depth(predictions.depth).float().mean().item(),
        "gflops_per_image": predictions.flops.mean().item() / 1e9,
    }


def bootstrap_intervals(predictions: Predictions, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals, over images, of accuracy, accuracy_macro and f1_macro."""
    cells, classes = _cells(predictions)

    def resample(chosen: np.ndarray) -> list[float]:
        return [*_accuracies(cells[chosen], classes).values()]

    ends = _bootstrap(resample, len(cells), seed).tolist()
    return dict(zip(_accuracies(cells, classes), map(tuple, ends), strict=True))


def paired_difference(
    first: Predictions, second: Predictions, per_class: bool = False
) -> tuple[float, float, float]:
    """Accuracy of ``first`` minus that of ``second``: difference, low and high end (95 %).

    Paired by image, so that what is hard for both cancels; with ``per_class`` the mean over
    classes. Raises ValueError when the images differ.
    """
    if not torch.equal(first.labels, second.labels):
        raise ValueError("the two models were evaluated on different images")
    gain = (first.correct.long() - second.correct.long()).numpy()
    labels = first.labels.numpy() if per_class else np.zeros_like(gain)

    def mean(chosen: np.ndarray) -> float:
        images = np.bincount(labels[chosen])
        sums = np.bincount(labels[chosen], weights=gain[chosen])
        return float((sums[images > 0] / images[images > 0]).mean())

    low, high = _bootstrap(mean, len(gain), seed=0).tolist()
    return mean(np.arange(len(gain))), low, high


def divergence(first: Predictions, second: Predictions) -> Tensor:
    """KL of the answers of ``first`` from those of ``second``, of each image [n], in nats."""
    logs = [F.log_softmax(one.logits, dim=1) for one in (first, second)]
    return F.kl_div(*logs, reduction="none", log_target=True).sum(dim=1)


def standard_error(accuracy: ArrayLike, images: int) -> ArrayLike:
    """The binomial standard error of an ``accuracy``, or of an array of them, over ``images``."""
    return (accuracy * (1 - accuracy) / images) ** 0.5


def _cells(predictions: Predictions) -> tuple[np.ndarray, int]:
    """Where each image [n] stands in the confusion matrix of K x K cells, and K."""
    classes = predictions.logits.shape[1]
    return (predictions.labels * classes + predictions.predicted).numpy(), classes


def _accuracies(cells: np.ndarray, classes: int) -> dict[str, float]:
    """Accuracy, mean per-class accuracy and macro F1 of images [n] in these cells."""
    confusion = np.bincount(cells, minlength=classes**2).reshape(classes, classes)
    hits = np.diag(confusion)
    true = confusion.sum(axis=1)
    either = true + confusion.sum(axis=0)  # images of a class, and predictions of it
    return {
        "accuracy": float(hits.sum() / len(cells)),
        "accuracy_macro": float((hits[true > 0] / true[true > 0]).mean()),
        "f1_macro": float((2 * hits[either > 0] / either[either > 0]).mean()),
    }


def _bootstrap(statistic: Callable[[np.ndarray], ArrayLike], images: int, seed: int) -> np.ndarray:
    """Percentile intervals [k, 2] of the k figures that ``statistic`` gives for image indices.

    [2] of a single figure; NaN for a single image.
    """
    drawn = np.random.default_rng(seed)
    found = [statistic(drawn.integers(images, size=images)) for _ in range(1000)]
    ends = np.percentile(found, (2.5, 97.5), axis=0).T
    return ends if images > 1 else np.full_like(ends, np.nan)
