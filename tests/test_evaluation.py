"""Metrics by hand, FLOPs against torch's own counter, bootstrap intervals."""

import pytest
import timm
import torch
from conftest import random_images, varied_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import avit_lib  # noqa: F401  registers the models
from avit_lib import evaluation


def predictions(predicted, labels, classes=3):
    """Predictions of a plain four-layer transformer with two tokens."""
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), classes).float()
    images = len(labels)
    depth, scores = torch.full((images, 2), 4), torch.zeros(images, 4, 2)
    return evaluation.Predictions(logits, torch.tensor(labels), depth, scores, 4)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_micro_patch4_28"])
def test_flops_of_a_plain_transformer_agree_with_torch(name):
    model = timm.create_model(name).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.zeros(1, *model.default_cfg["input_size"]))
    depth = torch.full((1, model.patch_embed.num_patches + 1), 12)
    expected = counter.get_total_flops() / 2  # torch counts a multiply-add twice
    assert evaluation.flops_per_image(model, depth).item() == pytest.approx(expected, rel=5e-3)


def test_deit_tiny_needs_the_flops_of_the_paper():
    model = timm.create_model("deit_tiny_patch16_224")
    assert evaluation.flops_per_image(model, torch.full((1, 197), 12)).item() == pytest.approx(1.3e9, rel=0.05)


def test_fewer_tokens_need_fewer_flops():
    model = timm.create_model("avit_nano_patch7_28")
    depth = torch.tensor([[4] * 17, [4] * 16 + [3], [4] * 9 + [1] * 8, [1] * 17])
    flops = evaluation.flops_per_image(model, depth)
    assert (flops.diff() < 0).all()


def test_layers_after_the_class_token_halted_cost_nothing():
    model = timm.create_model("avit_nano_patch7_28")
    flops = evaluation.flops_per_image(model, torch.tensor([[2] + [4] * 16, [2] * 17]))
    assert flops[0] == flops[1]


def test_flops_by_hand():
    model = timm.create_model("avit_nano_patch7_28")  # D = 16, MLP 32, 16 patches of 7 x 7, 10 classes
    linear = 16 * 48 + 16 * 16 + 2 * 16 * 32
    by_layer = [n * linear + 2 * n * n * 16 for n in (17, 5)]
    depth = torch.tensor([[2] * 5 + [1] * 12])
    assert evaluation.flops_per_image(model, depth).item() == sum(by_layer) + 16 * 49 * 16 + 10 * 16


def test_merging_costs_the_comparison_of_who_halts_with_the_patches_that_go_on():
    depth = torch.tensor([[2] * 5 + [1] * 12])
    dropped, merged = (
        evaluation.flops_per_image(timm.create_model("avit_nano_patch7_28", merge_halted=merging), depth).item()
        for merging in (False, True)
    )
    assert merged - dropped == 12 * 4 * 16


def test_classification_metrics_by_hand():
    #         class 0: 2 of 3 right; class 1: 1 of 1; class 2: 0 of 1
    labels = torch.tensor([0, 0, 0, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 0])
    found = evaluation.classification_metrics(predicted, labels, 3)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["accuracy_macro"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["f1_macro"] == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)


def test_a_class_without_images_does_not_count():
    found = predictions([0, 0, 2, 1], [0, 0, 1, 1])  # class 2 is predicted once, but has no image
    assert evaluation.classification_metrics(found.predicted, found.labels, 3)["accuracy_macro"] == 0.75
    alone = predictions([0, 0, 0, 1], [0, 0, 0, 1])  # class 1 is absent from a third of all resamples
    assert evaluation.bootstrap_intervals(alone, resamples=200)["accuracy_macro"] == (1.0, 1.0)
    confused = predictions([0] * 30 + [1, 1], [0] * 31 + [1])
    low, high = evaluation.bootstrap_intervals(confused, resamples=300)["accuracy_macro"]
    assert low > 0.85 and high == 1.0


def test_predict_and_metrics_of_a_model_that_halts():
    model, data = varied_model(0.5).float(), random_images(10)
    model.train()
    found = evaluation.predict(model, data, batch_size=4)
    assert model.training  # left as it was found
    model.eval()
    images = torch.stack([image for image, _ in data])
    with torch.no_grad():
        logits, trace = model.forward_with_trace(images)
    torch.testing.assert_close(found.logits, logits, rtol=0, atol=1e-5)
    assert torch.equal(found.labels, data.labels) and torch.equal(found.depth, trace.depth)
    assert torch.equal(found.correct, logits.argmax(1) == data.labels)
    values = evaluation.metrics(model, found)
    assert values["mean_depth"] == pytest.approx(trace.depth.double().mean().item())
    assert values["mean_executed_depth"] == pytest.approx(trace.executed_depth.double().mean().item())
    assert values["mean_executed_depth"] < values["mean_depth"]
    expected = evaluation.flops_per_image(model, trace.depth).mean().item()
    assert values["gflops_per_image"] == pytest.approx(expected / 1e9)


def test_a_plain_transformer_has_full_depth():
    model = timm.create_model("deit_nano_patch7_28")
    found = evaluation.predict(model, random_images(3))
    assert found.depth.shape == (3, 17) and (found.depth == 4).all() and found.layers == 4


def random_predictions(seed, accuracy=0.7, images=200):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % 3
    wrong = torch.rand(images, generator=generator) > accuracy
    shift = torch.randint(1, 3, (images,), generator=generator)
    return predictions(((labels + wrong * shift) % 3).tolist(), labels.tolist())


def test_bootstrap_intervals_surround_the_estimate():
    found = random_predictions(0)
    intervals = evaluation.bootstrap_intervals(found, resamples=300)
    point = evaluation.classification_metrics(found.predicted, found.labels, 3)
    assert intervals.keys() == point.keys()
    for name, (low, high) in intervals.items():
        assert low < point[name] < high
        assert 0.05 < high - low < 0.25  # 4 * sqrt(0.7 * 0.3 / 200) = 0.13


def test_bootstrap_is_reproducible_and_its_level_counts():
    found = random_predictions(0)
    first = evaluation.bootstrap_intervals(found, resamples=200, seed=1)
    assert first == evaluation.bootstrap_intervals(found, resamples=200, seed=1)
    assert first != evaluation.bootstrap_intervals(found, resamples=200, seed=2)
    narrow = evaluation.bootstrap_intervals(found, resamples=200, seed=1, level=0.5)["accuracy"]
    assert first["accuracy"][0] < narrow[0] < narrow[1] < first["accuracy"][1]


def test_a_perfect_model_has_no_spread():
    found = predictions([0, 1, 2] * 10, [0, 1, 2] * 10)
    assert set(evaluation.bootstrap_intervals(found, resamples=50).values()) == {(1.0, 1.0)}


def test_paired_difference():
    first, second = random_predictions(0, accuracy=0.9), random_predictions(1, accuracy=0.6)
    assert evaluation.paired_difference(first, first, resamples=100) == (0.0, 0.0, 0.0)
    difference, low, high = evaluation.paired_difference(first, second, resamples=300)
    assert difference == pytest.approx(first.correct.float().mean().item() - second.correct.float().mean().item())
    assert 0 < low < difference < high
    mirrored = evaluation.paired_difference(second, first, resamples=300)
    assert mirrored == pytest.approx((-difference, -high, -low))


def test_paired_difference_per_class_weighs_small_classes_like_large_ones():
    labels = [0] * 8 + [1] * 2
    first, second = predictions(labels, labels), predictions([0] * 9 + [1], labels)
    assert evaluation.paired_difference(first, second, resamples=50)[0] == pytest.approx(0.1)
    difference, low, high = evaluation.paired_difference(first, second, resamples=50, per_class=True)
    assert difference == pytest.approx(0.25) and 0 <= low <= difference <= high <= 0.5


def test_paired_difference_wants_the_same_images():
    with pytest.raises(ValueError, match="different images"):
        evaluation.paired_difference(predictions([0, 1], [0, 1]), predictions([0, 1], [1, 0]))
