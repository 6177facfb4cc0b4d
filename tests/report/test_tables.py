"""The tables, on predictions made by hand and on small models."""

from dataclasses import replace as replace_fields
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import random_images, varied_model
from msgspec.structs import replace

from avit_lib.evaluation import Predictions, predict
from avit_lib.flops import plain_flops
from avit_lib.report import tables
from avit_lib.study import get_profile


@pytest.fixture
def study():
    """A study whose plain models are alike, as are those that halt, on a few images."""
    profile = replace(
        get_profile("smoke"), peers={"ToMe": (2,)}, adapted=(0.1,), recalibrated={"avit": (2.0,)}
    )
    torch.manual_seed(0)
    plain, adaptive = timm.create_model("deit_nano").eval(), varied_model(depth=4).float()
    models = {run.name: adaptive if run.halting else plain for run in profile.runs}
    images = random_images(6)
    data = SimpleNamespace(validation=images)
    return SimpleNamespace(
        profile=profile, load=models.get, data=data, test=images, device="cpu", seed=0
    )


def test_the_evaluation_has_intervals_and_shares_and_no_depth_of_a_peer(study):
    full = torch.full((10,), plain_flops(study.load("deit"), 17))
    right = Predictions(torch.eye(10), torch.arange(10), torch.full((10, 17), 3), None, full, 4)
    wrong = replace_fields(right, logits=torch.eye(10).roll(1, 0), flops=full / 4)
    others = ["ToMe, r = 2", "Adaptive merging, 10% saved"]
    runs = study.profile.runs
    names = [run.name for run in runs] + others
    table = tables.evaluation_table(study, dict.fromkeys(names, right) | {"avit": wrong}, others)
    assert table["model"].tolist() == [run.label for run in runs] + others
    assert table["method"].tolist() == ["plain"] * 2 + ["paper"] * 5 + ["ours", "peer", "ours"]
    assert table["accuracy_macro_high"].tolist() == [1] * 6 + [0] + [1] * 3
    assert table["flops_saved"].tolist() == pytest.approx([0] * 6 + [0.75] + [0] * 3)
    assert table["mean_depth"].fillna(0).tolist() == [3] * 8 + [0, 3]


def test_models_that_need_no_training_save_what_they_are_named_after(study):
    models = tables.merged_models(study)
    full = tables.full_flops(study)
    saved = [
        tables.measure(predict(one, study.test), full)["flops_saved"] for one in models.values()
    ]
    assert list(models) == ["ToMe, r = 2", "Adaptive merging, 10% saved"]
    assert saved[0] > 0.1 and saved[1] == pytest.approx(0.1, abs=0.01)
    ((label, deeper),) = tables.recalibrated_models(study, "avit").items()
    assert label == "A-ViT from ImageNet, depth 2"
    assert predict(deeper, study.test).depth.double().mean() == pytest.approx(2, abs=0.2)
