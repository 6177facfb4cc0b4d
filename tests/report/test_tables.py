"""The tables, on predictions made by hand."""

from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import four_runs, varied_model
from msgspec.structs import replace
from PIL import Image

from avit_lib.data.datasets import folder_images
from avit_lib.evaluation import Predictions
from avit_lib.study import get_profile, tables

SMOKE = four_runs()
NAMES = [run.name for run in SMOKE.runs]
LABELS = ["DeiT", "DeiT trained longer", "A-ViT", "A-ViT fine-tuned"]


def test_evaluation_table_compares_with_the_plain_model():
    profile = replace(SMOKE, merging=())
    model = timm.create_model("avit_nano")
    labels = torch.arange(10)
    logits = torch.eye(10)
    shallow = Predictions(
        logits.roll(1, 0), labels, torch.ones(10, 17, dtype=torch.long), torch.zeros(10, 4, 17), 4
    )
    full = Predictions(logits, labels, torch.full((10, 17), 4), torch.zeros(10, 4, 17), 4)
    study = SimpleNamespace(profile=profile, load=lambda name: model)
    table = tables.evaluation_table(
        study, dict(zip(NAMES, (full, full, shallow, full), strict=True))
    )
    assert list(table.columns) == [
        "model",
        "method",
        "init",
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "accuracy_macro",
        "accuracy_macro_low",
        "accuracy_macro_high",
        "f1_macro",
        "f1_macro_low",
        "f1_macro_high",
        "mean_depth",
        "mean_executed_depth",
        "gflops_per_image",
        "flops_saved",
    ]
    assert list(table["model"]) == [run.label for run in profile.runs]
    assert list(table["accuracy"]) == [1, 1, 0, 1]
    assert list(table["mean_depth"]) == [4, 4, 1, 4]
    assert table["flops_saved"][0] == table["flops_saved"][3] == 0
    assert (
        0.5 < table["flops_saved"][2] < 0.75
    )  # three layers of four, less patch embedding and head
    assert (table["accuracy_low"] <= table["accuracy"]).all() and (
        table["accuracy"] <= table["accuracy_high"]
    ).all()


@pytest.mark.usefixtures("one_round")
def test_speed_of_masked_models_is_told_apart_and_images_may_be_files(tmp_path):
    plain, model = timm.create_model("deit_nano").eval(), varied_model(depth=4).float()
    for label in ("ant", "bee"):
        (tmp_path / label).mkdir()
        for number in range(3):
            Image.new("L", (28, 28), 40 * number).save(tmp_path / label / f"{number}.png")
    files = folder_images(tmp_path, 28)
    load = {"deit": plain, "deit_longer": plain, "avit": model, "avit_finetuned": model}.get
    study = SimpleNamespace(profile=SMOKE, load=load, device="cpu", test=files, seed=0)
    assert [tables.test_images(study, most).shape for most in (1, 9)] == [
        (1, 3, 28, 28),
        (6, 3, 28, 28),
    ]
    table = tables.speed_table(study, {"another": plain}, {"turned": model})
    trained = [
        "DeiT",
        "A-ViT",
        "A-ViT fine-tuned",
        "A-ViT fine-tuned, masked",
    ]  # the focus alone is masked, too
    assert list(table["model"]) == [
        *trained,
        *trained,
        "another",
        "turned",
        *["DeiT trained longer"] * 2,
    ]
    assert table["batch"].tolist() == [1] * 4 + [6] * 6 + [
        1,
        6,
    ]  # at most all test images, fewer than a batch
    assert (table.loc[table["model"] == "DeiT", "speedup"] == 1).all()
    alike, longer = (table[table["model"] == label].drop(columns="model") for label in LABELS[:2])
    assert longer.to_numpy().tolist() == alike.to_numpy().tolist()  # one architecture is timed once


def test_a_hundred_classes_of_one_or_a_few_images():
    profile, model = get_profile("caltech101"), timm.create_model("avit_nano", num_classes=101)
    labels = torch.cat(
        [torch.arange(101), torch.arange(50), torch.arange(50)]
    )  # half of them have a single image
    logits = torch.nn.functional.one_hot(
        (labels + (torch.arange(201) % 10 == 0)) % 101, 101
    ).float()
    found = Predictions(logits, labels, torch.full((201, 17), 4), torch.zeros(201, 4, 17), 4)
    study = SimpleNamespace(profile=replace(profile, merging=()), load=lambda name: model)
    names = [run.name for run in profile.runs]
    table = tables.evaluation_table(study, dict.fromkeys(names, found))
    assert (table["accuracy"] - 180 / 201).abs().max() < 1e-6
    assert (table["accuracy_macro_low"] < table["accuracy_macro"]).all()
    assert (table["accuracy_macro"] < table["accuracy_macro_high"]).all()
