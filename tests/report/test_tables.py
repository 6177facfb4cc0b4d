"""The tables, on predictions made by hand and on small models."""

from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import random_images, varied_model
from msgspec.structs import replace

from avit_lib.evaluation import predict
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


def test_models_that_need_no_training_save_what_they_are_named_after(study):
    models = tables.merged_models(study)
    full = plain_flops(study.load("deit"), 17)
    saved = [
        tables.measure(predict(one, study.test), full)["flops_saved"] for one in models.values()
    ]
    assert list(models) == ["ToMe, r = 2", "Adaptive merging, 10% saved"]
    assert saved[0] > 0.1 and saved[1] == pytest.approx(0.1, abs=0.01)
    ((label, deeper),) = tables.recalibrated_models(study, "avit").items()
    assert label == "A-ViT from ImageNet, depth 2"
    assert predict(deeper, study.test).depth.double().mean() == pytest.approx(2, abs=0.2)
