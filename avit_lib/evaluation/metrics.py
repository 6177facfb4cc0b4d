"""Accuracy, F1, depth and FLOPs of trained models, with bootstrap confidence intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from avit_lib.backbone import evaluating
from avit_lib.data import Images, loader
from avit_lib.errors import UserError, fitting_memory
from avit_lib.evaluation.allocator import give_back
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
    means: Tensor  # [n], of all values of an image: tells whether two sets are the same images
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

    @cached_property
    def rates(self) -> dict[str, np.ndarray]:
        """``rate_draws`` of ``draw_again``: computed once a model, however often it is compared."""
        return rate_draws(self, draw_again(len(self.labels)))


def check_answers(logits: Tensor) -> None:
    """Raise UserError where a model answers with what is no number."""
    if not logits.isfinite().all():
        raise UserError(
            "the model answers with values that are no numbers (NaN or infinite); train it again, "
            "at a lower learning rate"
        )


@torch.inference_mode()
def predict(
    model: nn.Module, data: Images, batch_size: int = 100, device: str | torch.device = "cpu"
) -> Predictions:
    """Run ``model`` in evaluation mode over ``data``.

    Raises UserError when memory is too small for ``batch_size``, and for answers that are no
    numbers.
    """
    model.to(device)
    batches = loader(data, batch_size)
    bar = tqdm(batches, desc="predicting", unit="batch", leave=False, disable=None)
    parts = []
    remedy = "lower batch_size of predict, or use --device cpu"
    with evaluating(model), fitting_memory(batch_size, remedy):
        for images, labels in bar:
            logits, trace = trace_model(model, images.to(device))
            check_answers(logits)
            followed = trace.depth, trace.halting_scores, flops_of(model, trace)
            means = images.mean(dim=(1, 2, 3))
            parts.append([one.cpu() for one in (logits.float(), labels, *followed, means)])
    logits, labels, depth, scores, flops, means = map(torch.cat, zip(*parts, strict=True))
    give_back()
    return Predictions(logits, labels, depth, scores, flops, means, len(model.blocks))


def metrics(predictions: Predictions) -> dict[str, float]:
    """The figures of one model: accuracies and F1 (0 to 1), depths in layers, GFLOPs per image.

    ``accuracy_macro`` is the mean over the classes that have images, ``f1_macro`` over those that
    have images or are predicted.
    """
    once = np.ones((1, len(predictions.labels)))
    return {name: rate.item() for name, rate in rate_draws(predictions, once).items()} | {
        "mean_depth": predictions.depth.float().mean().item(),
        "mean_executed_depth": executed_depth(predictions.depth).float().mean().item(),
        "gflops_per_image": predictions.flops.mean().item() / 1e9,
    }


def bootstrap_intervals(predictions: Predictions) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals, over images, of accuracy, accuracy_macro and f1_macro.

    NaN for a single image, and where all draws agree, as when all answers are right: how far the
    rate may be from that, they do not say.
    """
    ends = {name: find_interval(rate)[1:] for name, rate in predictions.rates.items()}
    unknown = np.nan, np.nan
    return {name: (low, high) if low < high else unknown for name, (low, high) in ends.items()}


def paired_difference(
    first: Predictions, second: Predictions, per_class: bool = False
) -> tuple[float, float, float]:
    """Accuracy of ``first`` minus that of ``second``: difference, low and high end (95 %).

    Paired by image, so that what is hard for both cancels; with ``per_class`` the mean over
    classes. Raises ValueError when the images differ.
    """
    _check_same(first, second)
    name = "accuracy_macro" if per_class else "accuracy"
    return find_interval(first.rates[name] - second.rates[name])


def divergence(first: Predictions, second: Predictions) -> Tensor:
    """KL(second || first) of the answers to each image [n], in nats; ValueError as above."""
    _check_same(first, second)
    logs = [F.log_softmax(one.logits, dim=1) for one in (first, second)]
    return F.kl_div(*logs, reduction="none", log_target=True).sum(dim=1)


def mean_ratio(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """The mean of ``first`` [n] divided by that of ``second`` [n]: ratio, low and high end (95 %).

    Paired: both are of the same images, which are drawn for both.
    """
    counts = draw_again(len(first))
    return find_interval((counts @ first) / (counts @ second))


@cache
def draw_again(images: int) -> np.ndarray:
    """How often each image counts, [1001, images]: once, then in each draw of a bootstrap.

    The draws are the same whenever there are as many images; NaN if there is a single one.
    """
    drawn = np.random.default_rng(0).integers(images, size=(1000, images))
    counts = np.stack([np.bincount(row, minlength=images) for row in drawn])
    counts = counts if images > 1 else np.full_like(counts, np.nan, dtype=float)
    return np.concatenate([np.ones((1, images)), counts])


def draw_over_seeds(
    pairs: Sequence[tuple[Predictions, Predictions]], names: Sequence[Sequence]
) -> np.ndarray:
    """A model from several seeds: mean per-class accuracy and KL of each draw, [2, 1001].

    Of each seed: its predictions and those of the plain model, and the ``names`` of its test
    images. A photograph that seeds share is drawn for all of them at once, as ``draw_again`` draws;
    then comes the mean over the seeds.
    """
    place = {name: number for number, name in enumerate(sorted(set().union(*names)))}
    counts = draw_again(len(place))
    values = []
    for (found, plain), own in zip(pairs, names, strict=True):
        drawn = counts[:, [place[name] for name in own]]
        kl = drawn @ divergence(found, plain).numpy() / drawn.sum(axis=1)
        values.append([rate_draws(found, drawn)["accuracy_macro"], kl])
    return np.mean(values, axis=0)


def rate_draws(predictions: Predictions, drawn: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, mean per-class accuracy and macro F1 [k] of images ``drawn`` [k, n] times each."""
    classes = predictions.logits.shape[1]
    both = predictions.labels, predictions.predicted
    true, said = (F.one_hot(one, classes).double().numpy() for one in both)
    images, called, hits = drawn @ true, drawn @ said, drawn @ (true * said)  # [k, K]
    with np.errstate(invalid="ignore"):  # a class without images has no rate
        by_class, f1 = pd.DataFrame(hits / images), pd.DataFrame(2 * hits / (images + called))
    return {
        "accuracy": hits.sum(axis=1) / images.sum(axis=1),
        "accuracy_macro": by_class.mean(axis=1).to_numpy(),
        "f1_macro": f1.mean(axis=1).to_numpy(),
    }


def _check_same(first: Predictions, second: Predictions) -> None:
    """Raise ValueError unless two models answered the same images, perhaps in another size."""
    same = torch.equal(first.labels, second.labels)  # and so equally many
    # Another size of the same photographs moves their means less than that.
    if not same or (first.means - second.means).abs().max() > 0.2:
        raise ValueError("the two models were evaluated on different images")


def find_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The first of ``values`` [1001], and the ends of the middle 95 % of the others, its draws."""
    low, high = np.percentile(values[1:], (2.5, 97.5)).tolist()
    return values[0].item(), low, high
