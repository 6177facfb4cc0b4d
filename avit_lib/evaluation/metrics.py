"""Accuracy, F1, depth and FLOPs of trained models, with bootstrap confidence intervals."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from tqdm.auto import tqdm

from avit_lib.backbone import TokensLeave
from avit_lib.data import Images, loader
from avit_lib.errors import fitting_memory
from avit_lib.evaluation.flops import flops_per_image
from avit_lib.halting import executed_depth


@dataclass(frozen=True)
class Predictions:
    """What a model said of a data set of n images, on the CPU."""

    logits: Tensor  # [n, K]
    labels: Tensor  # [n]
    depth: Tensor  # [n, N], every token to its own halting; of a plain transformer L everywhere
    halting_scores: Tensor  # [n, L, N]; of a model that does not halt 0 everywhere
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
    """Run ``model`` in evaluation mode over ``data``; raises UserError when memory is too small for
    ``batch_size``.
    """
    was_training = model.training
    model.to(device).eval()
    layers, tokens = len(model.blocks), model.patch_embed.num_patches + model.num_prefix_tokens
    outputs = []
    with fitting_memory(batch_size, "lower batch_size of predict, or use --device cpu"):
        batches = tqdm(
            loader(data, batch_size), desc="predicting", unit="batch", leave=False, disable=None
        )
        for images, labels in batches:
            depth, scores = (
                torch.full((len(images), tokens), layers),
                torch.zeros(len(images), layers, tokens),
            )
            if isinstance(model, TokensLeave):
                logits, trace = model.forward_with_trace(images.to(device))
                depth, scores = trace.depth, getattr(trace, "halting_scores", scores)
            else:
                logits = model(images.to(device))
            outputs.append((logits.float().cpu(), labels, depth.cpu(), scores.cpu()))
    model.train(was_training)
    return Predictions(*(torch.cat(part) for part in zip(*outputs, strict=True)), layers)


def classification_metrics(predicted: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Accuracy, mean per-class accuracy (over the classes that have images) and macro F1, fractions
    between 0 and 1.
    """
    by_class = multiclass_accuracy(predicted, labels, classes, average="none")
    return {
        "accuracy": multiclass_accuracy(predicted, labels, classes, average="micro").item(),
        "accuracy_macro": by_class[labels.unique()].mean().item(),
        "f1_macro": multiclass_f1_score(predicted, labels, classes, average="macro").item(),
    }


def metrics(model: VisionTransformer, predictions: Predictions) -> dict[str, float]:
    """The figures of one model: classification metrics, mean depth in layers, GFLOPs per image."""
    values = classification_metrics(
        predictions.predicted, predictions.labels, predictions.logits.shape[1]
    )
    values["mean_depth"] = predictions.depth.float().mean().item()
    values["mean_executed_depth"] = executed_depth(predictions.depth).float().mean().item()
    values["gflops_per_image"] = flops_per_image(model, predictions.depth).mean().item() / 1e9
    return values


def standard_error(accuracy: ArrayLike, images: int) -> ArrayLike:
    """The binomial standard error of an ``accuracy``, a fraction or an array of them, over that
    many ``images``.
    """
    return (accuracy * (1 - accuracy) / images) ** 0.5


def bootstrap_intervals(predictions: Predictions, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals, over images, of accuracy, accuracy_macro and f1_macro."""
    classes = predictions.logits.shape[1]
    cell = (predictions.labels * classes + predictions.predicted).numpy()

    def figures(
        chosen: np.ndarray,
    ) -> np.ndarray:  # as ``classification_metrics``, and a thousand times faster
        confusion = np.bincount(cell[chosen], minlength=classes**2).reshape(
            classes, classes
        )  # true classes in rows
        hits, true, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
        there = (
            true > 0
        )  # small classes are absent from some resamples: that is no mistake of the model
        met = (
            true + predicted > 0
        )  # as torchmetrics: a class neither there nor predicted does not count
        f1 = 2 * hits[met] / (true + predicted)[met]
        return np.array(
            [hits.sum() / confusion.sum(), (hits[there] / true[there]).mean(), f1.mean()]
        )

    found = _bootstrap(figures, len(cell), seed)
    return dict(
        zip(("accuracy", "accuracy_macro", "f1_macro"), map(tuple, found.tolist()), strict=True)
    )


def paired_difference(
    first: Predictions, second: Predictions, per_class: bool = False
) -> tuple[float, float, float]:
    """(Mean per-class) accuracy of ``first`` minus that of ``second``: difference, low and high end
    (95 %), paired.
    """
    if not torch.equal(first.labels, second.labels):
        raise ValueError("the two models were evaluated on different images")
    gain = (
        first.correct.long() - second.correct.long()
    ).numpy()  # of each image: what is hard for both cancels
    labels = first.labels.numpy() if per_class else np.zeros_like(gain)

    def mean(chosen: np.ndarray) -> np.ndarray:
        images = np.bincount(labels[chosen])
        sums = np.bincount(labels[chosen], weights=gain[chosen])
        return (sums[images > 0] / images[images > 0]).mean(keepdims=True)

    return (mean(np.arange(len(gain))).item(), *_bootstrap(mean, len(gain), seed=0)[0].tolist())


def _bootstrap(statistic: Callable[[np.ndarray], np.ndarray], images: int, seed: int) -> np.ndarray:
    """Percentile intervals [k, 2] of k figures, which ``statistic`` gives for the indices of
    resampled images.
    """
    options = dict(
        n_resamples=1000, vectorized=False, method="percentile", rng=np.random.default_rng(seed)
    )
    return np.stack(
        stats.bootstrap((np.arange(images),), statistic, **options).confidence_interval, axis=-1
    )
