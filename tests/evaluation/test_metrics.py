"""Metrics by hand, predictions of models, bootstrap intervals."""

import numpy as np
import pytest
import timm
import torch
from conftest import random_images, varied_model

from avit_lib.evaluation import (
    Predictions,
    bootstrap_intervals,
    flops_per_image,
    metrics,
    paired_difference,
    predict,
    standard_error,
)
from avit_lib.evaluation.metrics import classification_metrics
from avit_lib.halting import executed_depth


def predictions(predicted, labels, classes=3):
    """Predictions of a plain four-layer transformer with two tokens."""
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), classes).float()
    images = len(labels)
    depth, scores = torch.full((images, 2), 4), torch.zeros(images, 4, 2)
    return Predictions(logits, torch.tensor(labels), depth, scores, 4)


def test_classification_metrics_by_hand():
    #         class 0: 2 of 3 right; class 1: 1 of 1; class 2: 0 of 1
    labels = torch.tensor([0, 0, 0, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 0])
    found = classification_metrics(predicted, labels, 3)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["accuracy_macro"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["f1_macro"] == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)


def test_a_class_without_images_does_not_count():
    found = predictions([0, 0, 2, 1], [0, 0, 1, 1])  # class 2 is predicted once, but has no image
    assert classification_metrics(found.predicted, found.labels, 3)["accuracy_macro"] == 0.75
    alone = predictions(
        [0, 0, 0, 1], [0, 0, 0, 1]
    )  # class 1 is absent from a third of all resamples
    assert bootstrap_intervals(alone)["accuracy_macro"] == (1.0, 1.0)
    confused = predictions([0] * 30 + [1, 1], [0] * 31 + [1])
    low, high = bootstrap_intervals(confused)["accuracy_macro"]
    assert low > 0.85 and high == 1.0


def test_predict_and_metrics_of_a_model_that_halts():
    model, data = varied_model(0.5).float(), random_images(10)
    model.train()
    found = predict(model, data, batch_size=4)
    assert model.training  # left as it was found
    model.eval()
    images = torch.stack([image for image, _ in data])
    with torch.no_grad():
        logits, trace = model.forward_with_trace(images)
    torch.testing.assert_close(found.logits, logits, rtol=0, atol=1e-5)
    assert torch.equal(found.labels, data.labels) and torch.equal(found.depth, trace.depth)
    assert torch.equal(found.correct, logits.argmax(1) == data.labels)
    values = metrics(model, found)
    assert values["mean_depth"] == pytest.approx(trace.depth.double().mean().item())
    assert values["mean_executed_depth"] == pytest.approx(
        executed_depth(trace.depth).double().mean().item()
    )
    assert values["mean_executed_depth"] < values["mean_depth"]
    expected = flops_per_image(model, trace.depth).mean().item()
    assert values["gflops_per_image"] == pytest.approx(expected / 1e9)


def test_a_plain_transformer_has_full_depth():
    model = timm.create_model("deit_nano")
    found = predict(model, random_images(3))
    assert found.depth.shape == (3, 17) and (found.depth == 4).all() and found.layers == 4


def random_predictions(seed, accuracy=0.7, images=200):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 3
    wrong = torch.rand(images, generator=generator) > accuracy
    shift = torch.randint(1, 3, (images,), generator=generator)
    return predictions(((labels + wrong * shift) % 3).tolist(), labels.tolist())


def test_bootstrap_intervals_surround_the_estimate():
    found = random_predictions(0)
    intervals = bootstrap_intervals(found)
    point = classification_metrics(found.predicted, found.labels, 3)
    assert intervals.keys() == point.keys()
    for name, (low, high) in intervals.items():
        assert low < point[name] < high
        assert 0.05 < high - low < 0.25
    low, high = intervals["accuracy"]
    normal = 2 * 1.96 * (point["accuracy"] * (1 - point["accuracy"]) / 200) ** 0.5
    assert high - low == pytest.approx(normal, rel=0.12)  # 95 %: at 90 % it would be 16 % less


def test_bootstrap_is_reproducible():
    found = random_predictions(0)
    first = bootstrap_intervals(found, seed=1)
    assert first == bootstrap_intervals(found, seed=1)
    assert first != bootstrap_intervals(found, seed=2)


def test_a_perfect_model_has_no_spread():
    found = predictions([0, 1, 2] * 10, [0, 1, 2] * 10)
    assert set(bootstrap_intervals(found).values()) == {(1.0, 1.0)}


def test_paired_difference():
    first, second = random_predictions(0, accuracy=0.9), random_predictions(1, accuracy=0.6)
    assert paired_difference(first, first) == (0.0, 0.0, 0.0)
    difference, low, high = paired_difference(first, second)
    assert difference == pytest.approx(
        first.correct.float().mean().item() - second.correct.float().mean().item()
    )
    assert 0 < low < difference < high
    mirrored = paired_difference(second, first)
    assert mirrored == pytest.approx((-difference, -high, -low))


def test_paired_difference_per_class_weighs_small_classes_like_large_ones():
    labels = [0] * 8 + [1] * 2
    first, second = predictions(labels, labels), predictions([0] * 9 + [1], labels)
    assert paired_difference(first, second)[0] == pytest.approx(0.1)
    difference, low, high = paired_difference(first, second, per_class=True)
    assert difference == pytest.approx(0.25) and 0 <= low <= difference <= high <= 0.5


def test_paired_difference_wants_the_same_images():
    with pytest.raises(ValueError, match="different images"):
        paired_difference(predictions([0, 1], [0, 1]), predictions([0, 1], [1, 0]))


def test_the_standard_error_is_the_spread_of_accuracies():
    right = np.random.default_rng(0).random((20000, 100)) < 0.8  # 20,000 draws of 100 images
    assert standard_error(0.8, 100) == pytest.approx(right.mean(axis=1).std(), rel=0.03)
