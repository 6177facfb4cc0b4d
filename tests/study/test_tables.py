"""The tables, on predictions made by hand."""

import gc
from functools import partial
from types import SimpleNamespace

import pandas as pd
import pytest
import timm
import torch
from conftest import random_images, varied_model
from msgspec.structs import replace
from PIL import Image

from avit_lib.data.datasets import folder_images
from avit_lib.evaluation import Predictions, predict, speed
from avit_lib.study import get_profile, tables

CLASSES = ("ant", "bee", "cat")
SMOKE = get_profile("smoke")
NAMES = [run.name for run in SMOKE.runs]
LABELS = ["DeiT", "DeiT trained on", "A-ViT", "A-ViT fine-tuned"]
MERGED = ["ToMe, r = 2", "ToMe, r = 30"]


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
    profile = replace(SMOKE, merging=())
    model = timm.create_model("avit_nano_patch7_28")
    labels = torch.arange(10)
    logits = torch.eye(10)
    shallow = Predictions(logits.roll(1, 0), labels, torch.ones(10, 17, dtype=torch.long), torch.zeros(10, 4, 17), 4)
    full = Predictions(logits, labels, torch.full((10, 17), 4), torch.zeros(10, 4, 17), 4)
    study = SimpleNamespace(profile=profile, load=lambda name: model)
    table = tables.evaluation_table(study, dict(zip(NAMES, (full, full, shallow, full), strict=True)))
    assert list(table.columns) == [
        "model", "init", "accuracy", "accuracy_low", "accuracy_high", "accuracy_macro", "accuracy_macro_low",
        "accuracy_macro_high", "f1_macro", "f1_macro_low", "f1_macro_high", "mean_depth", "mean_executed_depth",
        "gflops_per_image", "flops_saved",
    ]  # fmt: skip
    assert list(table["model"]) == [run.label for run in profile.runs]
    assert list(table["accuracy"]) == [1, 1, 0, 1]
    assert list(table["mean_depth"]) == [4, 4, 1, 4]
    assert table["flops_saved"][0] == table["flops_saved"][3] == 0
    assert 0.5 < table["flops_saved"][2] < 0.75  # three layers of four, less patch embedding and head
    assert (table["accuracy_low"] <= table["accuracy"]).all() and (table["accuracy"] <= table["accuracy_high"]).all()


@pytest.fixture
def one_round(monkeypatch):
    """Timings take one short round."""
    monkeypatch.setattr(speed, "interleaved", partial(speed.interleaved, minimum=0.01))
    monkeypatch.setattr(tables, "throughput", partial(speed.throughput, repeats=1))
    gc.freeze()  # what is there need not be looked through before each timing
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("one_round")
def test_merged_models_stand_beside_the_trained_ones():
    profile = replace(SMOKE, merging=(2, 30))
    plain = timm.create_model("deit_nano_patch7_28").eval()
    adaptive = timm.create_model("avit_nano_patch7_28", beta=-1e4).eval()
    study = SimpleNamespace(
        profile=profile, load=lambda name: plain if name.startswith("deit") else adaptive, device="cpu",
        test=random_images(20), predict=predict,
    )  # fmt: skip
    predictions = tables.predict_runs(study)
    assert list(predictions) == [*NAMES, *MERGED]
    table = tables.evaluation_table(study, predictions).set_index("model")
    assert table.loc["ToMe, r = 30", "gflops_per_image"] < table.loc["ToMe, r = 2", "gflops_per_image"]
    assert table.loc["ToMe, r = 2", "flops_saved"] > 0 and table["mean_depth"].isna().sum() == 2
    differences = tables.difference_table(profile, predictions)
    assert list(differences["model"]) == [*LABELS[1:], *MERGED, LABELS[0], *LABELS[2:], *MERGED]
    assert list(differences["minus"]) == ["DeiT"] * 5 + ["DeiT trained on"] * 5
    timed = tables.speed_table(study, [4])
    assert list(timed["model"]) == [*LABELS, *MERGED]
    summary = tables.summary_table(table.reset_index().merge(timed, on="model"), differences)
    assert list(summary["mean depth [layers]"]) == ["4.00"] * 4 + ["", ""]
    assert list(summary["minus DeiT trained on [points]"])[1] == ""  # not minus itself
    assert (summary.drop(index=1)["minus DeiT trained on [points]"].str.match(r"[+-]\d+\.\d\d \(")).all()


def test_a_difference_is_minus_the_plain_model_on_the_same_images(halting, plain):
    profile = replace(SMOKE, runs=tuple(run for run in SMOKE.runs if run.name != "deit_longer"))
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


def test_published_figures_stand_beside_ours():
    study = SimpleNamespace(profile=get_profile("fashion"))
    labels = [run.label for run in study.profile.runs]
    ours = pd.DataFrame({
        "model": labels, "accuracy": [0.9, 0.85, 0.8, 0.95], "f1_macro": 0.5, "mean_depth": 6.0,
        "gflops_per_image": 1.0, "speedup": 2.0,
    })  # fmt: skip
    table = tables.published_table(study, ours).set_index(["model", "figure"])
    row = table.loc[("A-ViT", "accuracy minus DeiT's")]
    assert row["ours, FashionMNIST"] == pytest.approx(-0.1) and row["paper, ImageNet"] == pytest.approx(-0.003)
    assert table.loc[("DeiT", "accuracy"), "report, Caltech-256"] == pytest.approx(0.7322)
    assert table.notna().any(axis=1).all() and ("DeiT", "mean depth [layers]") not in table.index


@pytest.mark.usefixtures("one_round")
def test_speed_of_masked_models_is_told_apart_and_first_images_may_be_files(tmp_path):
    plain, model = timm.create_model("deit_nano_patch7_28").eval(), varied_model(depth=4).float()
    for label in ("ant", "bee"):
        (tmp_path / label).mkdir()
        for number in range(3):
            Image.new("L", (28, 28), 40 * number).save(tmp_path / label / f"{number}.png")
    files = folder_images(tmp_path, 28, 1)
    load = {"deit": plain, "deit_longer": plain, "avit": model, "avit_finetuned": model}.get
    study = SimpleNamespace(profile=SMOKE, load=load, device="cpu", test=files)
    assert [tables.first_images(study, most).shape for most in (1, 9)] == [(1, 1, 28, 28), (6, 1, 28, 28)]
    table = tables.speed_table(study, [1, 2], masked=True)
    assert list(table["model"]) == 2 * [*LABELS, "A-ViT, masked", "A-ViT fine-tuned, masked"]
    assert table["batch"].tolist() == [1] * 6 + [2] * 6
    assert (table.loc[table["model"] == "DeiT", "speedup"] == 1).all()


@pytest.mark.usefixtures("one_round")
def test_a_model_is_turned_to_other_depths():
    profile = replace(SMOKE, merging=(), dial=(2.0, 3.0))
    plain, model = timm.create_model("deit_nano_patch7_28").eval(), varied_model(depth=4).float()
    study = SimpleNamespace(
        profile=profile, seed=0, device="cpu", test=random_images(40), predict=predict,
        data=SimpleNamespace(validation=random_images(30, seed=1)),
        load=lambda name: plain if name.startswith("deit") else model,
    )  # fmt: skip
    turned = tables.dialled_models(study)
    assert model.beta == -1.0 and turned["A-ViT fine-tuned, depth 2"].beta > turned["A-ViT fine-tuned, depth 3"].beta
    timed = tables.speed_table(study, [8], others=turned)
    points = tables.operating_points(study, tables.predict_runs(study), turned, timed)
    assert points["mean_depth"].is_monotonic_increasing and len(points) == 3
    depth = points.set_index("model")["mean_depth"]
    assert depth["A-ViT fine-tuned, depth 2"] == pytest.approx(2, abs=0.3)
    assert points["flops_saved"].is_monotonic_decreasing and (points["images_per_second"] > 0).all()


def test_a_hundred_classes_of_one_or_a_few_images():
    profile, model = get_profile("caltech101"), timm.create_model("avit_nano_patch7_28", num_classes=101)
    labels = torch.cat([torch.arange(101), torch.arange(50), torch.arange(50)])  # half of them have a single image
    logits = torch.nn.functional.one_hot((labels + (torch.arange(201) % 10 == 0)) % 101, 101).float()
    found = Predictions(logits, labels, torch.full((201, 17), 4), torch.zeros(201, 4, 17), 4)
    study = SimpleNamespace(profile=replace(profile, merging=()), load=lambda name: model)
    names = [run.name for run in profile.runs]
    table = tables.evaluation_table(study, dict.fromkeys(names, found))
    assert (table["accuracy"] - 180 / 201).abs().max() < 1e-6
    assert (table["accuracy_macro_low"] < table["accuracy_macro"]).all()
    assert (table["accuracy_macro"] < table["accuracy_macro_high"]).all()
