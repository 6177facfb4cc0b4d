"""Metrics by hand, predictions of models, bootstrap intervals."""

from dataclasses import replace
from math import isnan

import numpy as np
import pytest
import torch
from conftest import random_images, varied_model

from avit_lib.evaluation import (
    Predictions,
    bootstrap_intervals,
    divergence,
    draw_over_seeds,
    find_interval,
    mean_ratio,
    metrics,
    paired_difference,
    predict,
)
from avit_lib.flops import counted_flops
from avit_lib.halting import executed_depth


def predictions(predicted, labels):
    """Predictions of three classes by a plain four-layer transformer with two tokens."""
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), 3).float()
    images = len(labels)
    depth = torch.full((images, 2), 4)
    flops, means = torch.full((images,), 1e9), torch.arange(images)
    return Predictions(logits, torch.tensor(labels), depth, None, flops, means, 4)


def random_predictions(seed, accuracy=0.7):
    labels = torch.arange(200) % 3
    wrong = torch.rand(200, generator=torch.Generator().manual_seed(seed)) > accuracy
    return predictions(((labels + wrong) % 3).tolist(), labels.tolist())


def test_metrics_by_hand():
    # class 0: 2 of 3 right; class 1: 1 of 1; class 2: 0 of 1
    assert metrics(predictions([0, 0, 1, 1, 0], [0, 0, 0, 1, 2])) == pytest.approx(
        {
            "accuracy": 3 / 5,
            "accuracy_macro": (2 / 3 + 1 + 0) / 3,
            "f1_macro": (4 / 6 + 2 / 3 + 0) / 3,
            "mean_depth": 4,
            "mean_executed_depth": 4,
            "gflops_per_image": 1,
        }
    )


def test_a_class_without_images_does_not_count():
    # Class 2 is predicted once, but has no image.
    assert metrics(predictions([0, 0, 2, 1], [0, 0, 1, 1]))["accuracy_macro"] == 0.75
    assert metrics(predictions([0, 1, 1], [0, 1, 0]))["f1_macro"] == pytest.approx(2 / 3)
    # Class 1 is absent from a third of all resamples: that is no mistake of the model.
    alone = predictions([0, 0, 0, 1], [0, 0, 0, 1])
    assert all((rate == 1).all() for rate in alone.rates.values())


def test_predictions_of_a_model_that_halts_are_those_of_its_trace():
    model, data = varied_model(0.5).float().train(), random_images(10)
    found = predict(model, data, batch_size=4)
    assert model.training  # left as it was found
    images = torch.stack([image for image, _ in data])
    with torch.no_grad():
        logits, trace = model.eval().forward_with_trace(images)
    torch.testing.assert_close(found.logits, logits)
    torch.testing.assert_close(found.halting_scores, trace.halting_scores)
    assert torch.equal(found.depth, trace.depth)
    values, executed = metrics(found), executed_depth(trace.depth).double().mean().item()
    assert values["mean_executed_depth"] == pytest.approx(executed)
    assert executed < values["mean_depth"]
    counted = counted_flops(model, images) / 1e9  # in a packed run
    assert values["gflops_per_image"] == pytest.approx(counted, rel=1e-6)


def test_bootstrap_intervals_have_the_width_of_the_normal_approximation():
    found = random_predictions(0)
    intervals, point = bootstrap_intervals(found), metrics(found)
    assert list(intervals) == ["accuracy", "accuracy_macro", "f1_macro"]
    for name, (low, high) in intervals.items():
        assert low < point[name] < high
    low, high = intervals["accuracy"]
    normal = 2 * 1.96 * (point["accuracy"] * (1 - point["accuracy"]) / 200) ** 0.5
    assert high - low == pytest.approx(normal, rel=0.12)  # 95 %: at 90 % it would be 16 % less


@pytest.mark.parametrize("answers", [[0], [0, 1, 2]])
def test_of_one_image_or_where_all_answers_are_right_no_interval_is_known(answers):
    found = bootstrap_intervals(predictions(answers, answers))
    assert all(isnan(end) for ends in found.values() for end in ends)


def test_paired_difference_is_antisymmetric_and_wants_the_same_images():
    first, second = random_predictions(0, accuracy=0.9), random_predictions(1, accuracy=0.6)
    difference, low, high = paired_difference(first, second)
    assert 0 < low < difference < high
    assert paired_difference(second, first) == pytest.approx((-difference, -high, -low))
    others = replace(second, means=second.means.flip(0))  # of the same classes
    for compare in (paired_difference, divergence):
        with pytest.raises(ValueError, match="different images"):
            compare(first, others)
    with pytest.raises(ValueError, match="different images"):
        paired_difference(predictions([0, 1], [0, 1]), predictions([0, 1], [1, 0]))


def test_paired_difference_per_class_weighs_small_classes_like_large_ones():
    labels = [0] * 8 + [1] * 2
    first, second = predictions(labels, labels), predictions([0] * 9 + [1], labels)
    assert paired_difference(first, second)[0] == pytest.approx(0.1)
    difference, low, high = paired_difference(first, second, per_class=True)
    assert difference == pytest.approx(0.25)
    assert 0 <= low <= difference <= high <= 0.5


def test_a_ratio_is_of_the_same_images():
    values = np.random.default_rng(0).random(50) + 0.1
    assert mean_ratio(2 * values, values) == pytest.approx((2, 2, 2))  # whichever are drawn
    ratio, low, high = mean_ratio(values, values[::-1])
    assert low < 1 < high and ratio == pytest.approx(1)


def test_draws_over_seeds_are_those_of_one_seed_and_shared_by_photograph():
    plain, model = random_predictions(0, accuracy=0.9), random_predictions(1)
    names = range(200)
    once = draw_over_seeds([(model, plain)], [names])
    base = draw_over_seeds([(plain, plain)], [names])
    expected = paired_difference(model, plain, per_class=True)
    assert find_interval(once[0] - base[0]) == pytest.approx(expected)
    assert once[1, 0] == pytest.approx(divergence(model, plain).mean().item())
    # The same photographs again tell nothing new; others, as many, make the interval narrower.
    again = draw_over_seeds([(model, plain)] * 2, [names] * 2)
    assert np.allclose(again, once)
    more = draw_over_seeds([(model, plain)] * 2, [names, range(200, 400)])
    assert more[0].std() < 0.9 * once[0].std()
