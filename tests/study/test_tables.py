"""The tables, on predictions made by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import timm
import torch
from conftest import random_images, varied_model

from avit_lib import tables
from avit_lib.config import get_profile
from avit_lib.evaluation import Predictions, predict

CLASSES = ("ant", "bee", "cat")


def predictions(predicted: list[int], labels: list[int], depth: torch.Tensor, layers: int = 4) -> Predictions:
    """Predictions of certain classes; the scores are not looked at."""
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), len(CLASSES)).float()
    return Predictions(logits, torch.tensor(labels), depth, torch.zeros(len(labels), layers, depth.shape[1]), layers)


@pytest.fixture
def halting() -> Predictions:
    """Six images of three tokens; the first bee is taken for a cat."""
    depth = torch.tensor([[1, 1, 1], [2, 2, 2], [4, 4, 4], [3, 3, 3], [1, 1, 4], [2, 2, 1]])
    return predictions([0, 0, 2, 1, 2, 2], [0, 0, 1, 1, 2, 2], depth)


@pytest.fixture
def plain() -> Predictions:
    return predictions([0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], torch.full((6, 3), 4))


def test_evaluation_table_compares_with_the_plain_model():
    profile = replace(get_profile("smoke"), merging=())
    model = timm.create_model("avit_nano_patch7_28")
    labels = torch.arange(10)
    logits = torch.eye(10)
    shallow = Predictions(logits.roll(1, 0), labels, torch.ones(10, 17, dtype=torch.long), torch.zeros(10, 4, 17), 4)
    full = Predictions(logits, labels, torch.full((10, 17), 4), torch.zeros(10, 4, 17), 4)
    study = SimpleNamespace(profile=profile, load=lambda name: model)
    table = tables.evaluation_table(study, {"deit": full, "avit": shallow, "avit_finetuned": full})
    assert list(table.columns) == [
        "model", "init", "accuracy", "accuracy_low", "accuracy_high", "accuracy_macro", "accuracy_macro_low",
        "accuracy_macro_high", "f1_macro", "f1_macro_low", "f1_macro_high", "mean_depth", "mean_executed_depth",
        "gflops_per_image", "flops_saved",
    ]  # fmt: skip
    assert list(table["model"]) == [run.label for run in profile.runs]
    assert list(table["accuracy"]) == [1, 0, 1]
    assert list(table["mean_depth"]) == [4, 1, 4]
    assert table["flops_saved"][0] == table["flops_saved"][2] == 0
    assert 0.5 < table["flops_saved"][1] < 0.75  # three layers of four, less patch embedding and head
    assert (table["accuracy_low"] <= table["accuracy"]).all() and (table["accuracy"] <= table["accuracy_high"]).all()


def test_merged_models_stand_beside_the_trained_ones():
    profile = replace(get_profile("smoke"), merging=(2, 30))
    plain = timm.create_model("deit_nano_patch7_28").eval()
    adaptive = timm.create_model("avit_nano_patch7_28", beta=-1e4).eval()
    study = SimpleNamespace(
        profile=profile, load=lambda name: plain if name == "deit" else adaptive, device="cpu", test=random_images(20),
        predict=predict,
    )  # fmt: skip
    predictions = tables.predict_runs(study)
    assert list(predictions) == ["deit", "avit", "avit_finetuned", "ToMe, r = 2", "ToMe, r = 30"]
    table = tables.evaluation_table(study, predictions).set_index("model")
    assert table.loc["ToMe, r = 30", "gflops_per_image"] < table.loc["ToMe, r = 2", "gflops_per_image"]
    assert table.loc["ToMe, r = 2", "flops_saved"] > 0 and table["mean_depth"].isna().sum() == 2
    differences = tables.difference_table(profile, predictions)
    assert list(differences["model"]) == ["A-ViT", "A-ViT fine-tuned", "ToMe, r = 2", "ToMe, r = 30"]
    speed = tables.speed_table(study, [4])
    assert list(speed["model"]) == [*profile_labels(profile), "ToMe, r = 2", "ToMe, r = 30"]
    summary = tables.summary_table(table.reset_index().merge(speed, on="model"), differences)
    assert list(summary["mean depth [layers]"]) == ["4.00", "4.00", "4.00", "", ""]


def profile_labels(profile) -> list[str]:
    return [run.label for run in profile.runs]


def test_differences_are_of_the_adaptive_models(halting, plain):
    profile = get_profile("smoke")
    table = tables.difference_table(profile, {"deit": plain, "avit": plain, "avit_finetuned": halting})
    assert list(table["model"]) == ["A-ViT", "A-ViT fine-tuned"]
    assert set(table["minus"]) == {"DeiT"}
    assert table["difference"].tolist() == pytest.approx([0, -1 / 6])
    assert table["low"][1] <= -1 / 6 <= table["high"][1] <= 0


def test_differences_are_from_every_plain_model(halting, plain):
    profile = get_profile("caltech101")
    found = {"deit": plain, "deit_longer": halting, "avit": halting}
    table = tables.difference_table(profile, found).set_index(["minus", "model"])
    labels = [profile.run(name).label for name in found]
    assert set(table.index) == {
        (labels[0], labels[1]),
        (labels[0], labels[2]),
        (labels[1], labels[0]),
        (labels[1], labels[2]),
    }
    assert table.loc[(labels[1], labels[2]), "difference"] == 0
    assert table.loc[(labels[0], labels[2]), ["difference", "difference_macro"]].tolist() == pytest.approx([-1 / 6] * 2)


def test_accuracy_by_class_of_two_models(halting, plain):
    table = tables.class_accuracy_table(halting, plain, (*CLASSES, "dog"))
    assert table["class"].tolist() == ["bee", "ant", "cat"]  # the dog has no images
    assert table["before"].tolist() == [1, 1, 1] and table["change"].tolist() == [-0.5, 0, 0]


def test_every_run_is_described_by_its_settings():
    runs = get_profile("caltech101").runs
    table = tables.run_table(get_profile("caltech101")).set_index("model")
    assert (table["gamma"] == "").tolist() == [run.halting is None for run in runs]
    assert table.loc["A-ViT fitted", ["starts from", "taught by"]].tolist() == ["deit", "deit_longer"]
    assert table.loc["DeiT fine-tuned", ["starts from", "taught by"]].tolist() == ["deit_tiny_patch16_224.fb_in1k", ""]


def test_published_figures_stand_beside_ours():
    study = SimpleNamespace(profile=get_profile("fashion"))
    labels = [run.label for run in study.profile.runs]
    ours = pd.DataFrame({
        "model": labels, "accuracy": [0.9, 0.8, 0.95], "f1_macro": 0.5, "mean_depth": 6.0, "gflops_per_image": 1.0,
        "speedup": 2.0,
    })  # fmt: skip
    table = tables.published_table(study, ours).set_index(["model", "figure"])
    row = table.loc[("A-ViT", "accuracy minus DeiT's")]
    assert row["ours, FashionMNIST"] == pytest.approx(-0.1) and row["paper, ImageNet"] == pytest.approx(-0.003)
    assert table.loc[("DeiT", "accuracy"), "report, Caltech-256"] == pytest.approx(0.7322)
    assert table.notna().any(axis=1).all() and ("DeiT", "mean depth [layers]") not in table.index


def test_starts_are_those_of_models_that_halt_and_start_from_trained_weights():
    models = {"avit_finetuned": varied_model(depth=4).float()}
    study = SimpleNamespace(
        profile=get_profile("smoke"), predict=predict, data=SimpleNamespace(validation=random_images(30)),
        initial_model=lambda run: models[run.name],
    )  # fmt: skip
    (row,) = tables.start_table(study).to_dict("records")
    assert row["model"] == "A-ViT fine-tuned" and 1 < row["val_mean_depth"] < 4


def test_a_model_is_turned_to_other_depths():
    profile = replace(get_profile("smoke"), merging=(), dial=(2.0, 3.0))
    plain, model = timm.create_model("deit_nano_patch7_28").eval(), varied_model(depth=4).float()
    study = SimpleNamespace(
        profile=profile, seed=0, device="cpu", test=random_images(40), predict=predict,
        data=SimpleNamespace(validation=random_images(30, seed=1)),
        load=lambda name: plain if name == "deit" else model,
    )  # fmt: skip
    turned = tables.dialled_models(study)
    assert model.beta == -1.0 and turned["A-ViT fine-tuned, depth 2"].beta > turned["A-ViT fine-tuned, depth 3"].beta
    speed = tables.speed_table(study, [8], others=turned)
    points = tables.operating_points(study, tables.predict_runs(study), turned, speed)
    assert points["mean_depth"].is_monotonic_increasing and len(points) == 3
    depth = points.set_index("model")["mean_depth"]
    assert depth["A-ViT fine-tuned, depth 2"] == pytest.approx(2, abs=0.3)
    assert points["flops_saved"].is_monotonic_decreasing and (points["images_per_second"] > 0).all()


def test_class_counts_of_several_sets():
    table = tables.class_counts({"train": random_images(7, classes=3), "validation": random_images(3, classes=3)})
    assert table["train"].tolist() == [3, 2, 2]
    assert table["validation"].tolist() == [1, 1, 1]


def test_epoch_table_keeps_the_order_and_renames():
    history = pd.DataFrame({"epoch": [1, 2], "train_task": [2.0, 1.0], "seconds": [3, 3]})
    table = tables.epoch_table({"A-ViT": history, "A-ViT fine-tuned": history.tail(1)}, {"train_task": "task"})
    assert table.to_dict("list") == {
        "model": ["A-ViT", "A-ViT", "A-ViT fine-tuned"], "epoch": [1, 2, 2], "task": [2.0, 1.0, 1.0],
    }  # fmt: skip


def test_reload_check_shows_a_difference():
    table = tables.reload_check(
        pd.Series({"val_accuracy": 0.75, "val_f1_macro": 0.5}), {"accuracy": 0.75, "f1_macro": 0.25}
    )
    assert table["difference"].tolist() == [0, -0.25]


def test_confusion_has_the_true_class_in_rows(halting):
    assert tables.confusion(halting).tolist() == [[2, 0, 0], [0, 1, 1], [0, 0, 2]]


def test_confusion_pairs_leave_out_what_never_happens(halting, plain):
    table = tables.confusion_pairs(halting, plain, CLASSES, ("A-ViT", "DeiT"))
    assert table.to_dict("records") == [{"true class": "bee", "taken for": "cat", "A-ViT": 1, "DeiT": 0}]


def test_accuracy_by_depth_puts_the_shallowest_first(halting):
    table = tables.accuracy_by_depth(halting, groups=3)
    assert table["images"].tolist() == [2, 2, 2]
    assert table["mean_depth"].is_monotonic_increasing
    assert table["accuracy"].tolist() == [1, 1, 0.5]
    assert ((table["low"] <= table["accuracy"]) & (table["accuracy"] <= table["high"])).all()


def test_accuracy_by_depth_of_fewer_images_than_groups(halting):
    assert tables.accuracy_by_depth(halting, groups=8)["images"].sum() == 6


@pytest.mark.parametrize(
    ("hits", "images", "expected"), [(0, 10, (0, 0.2775)), (10, 10, (0.7225, 1)), (50, 100, (0.4038, 0.5962))]
)
def test_wilson_interval(hits, images, expected):
    assert tables.wilson_interval(hits, images) == pytest.approx(expected, abs=1e-3)


def test_class_depth_table_is_sorted_by_depth(halting):
    table = tables.class_depth_table(halting, CLASSES)
    assert table["class"].tolist() == ["bee", "cat", "ant"]
    assert table["mean_depth"].tolist() == pytest.approx([3.5, 11 / 6, 1.5])
    assert table["accuracy"].tolist() == [0.5, 1, 1]


def test_images_are_chosen_by_seed_one_a_class():
    labels = torch.arange(60) % 20
    chosen = tables.one_per_class(labels, seed=3)
    assert torch.equal(chosen, tables.one_per_class(labels, seed=3))
    assert not torch.equal(chosen, tables.one_per_class(labels, seed=4))
    assert len(chosen) == 10 and (labels[chosen].diff() > 0).all()
    assert labels[tables.one_per_class(labels, seed=3, most=30)].tolist() == list(range(20))
    assert labels[tables.some_per_class(labels, seed=3, each=2, most=20)].bincount().tolist() == [2] * 20
    assert labels[tables.some_per_class(labels, seed=3, each=2, most=3)].unique().tolist() == [0, 10, 19]


def test_extremes_are_the_extremes(halting):
    table = tables.depth_extremes(halting, CLASSES, count=2)
    images = {name: rows["image"].tolist() for name, rows in table.groupby("group")}
    assert images["shallowest"] == [0, 5]
    assert images["deepest"] == [2, 3]
    assert images["widest spread"] == [4, 5]


def test_a_hundred_classes_of_one_or_a_few_images():
    profile, model = get_profile("caltech101"), timm.create_model("avit_nano_patch7_28", num_classes=101)
    classes = tuple(f"class {number:03d}" for number in range(101))
    labels = torch.cat([torch.arange(101), torch.arange(50), torch.arange(50)])  # half of them have a single image
    logits = torch.nn.functional.one_hot((labels + (torch.arange(201) % 10 == 0)) % 101, 101).float()
    found = Predictions(logits, labels, torch.full((201, 17), 4), torch.zeros(201, 4, 17), 4)
    study = SimpleNamespace(profile=replace(profile, merging=()), load=lambda name: model)
    names = [run.name for run in profile.runs]
    table = tables.evaluation_table(study, dict.fromkeys(names, found))
    assert (table["accuracy"] - 180 / 201).abs().max() < 1e-6
    assert (table["accuracy_macro_low"] < table["accuracy_macro"]).all()
    assert (table["accuracy_macro"] < table["accuracy_macro_high"]).all()
    by_class = tables.class_depth_table(found, classes)
    assert len(by_class) == 101 and by_class["images"].sum() == 201
    assert tables.confusion(found).shape == (101, 101)
    assert len(tables.confusion_pairs(found, found, classes, ("one", "other"))) == 10
    assert len(tables.one_per_class(labels, seed=0)) == 10
