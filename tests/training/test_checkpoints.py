"""Checkpoints: what is written is what is read; faults are named; nothing read runs code."""

import pytest
import timm
import torch
from conftest import refused
from safetensors.torch import save_file

from avit_lib.training import (
    load_checkpoint,
    load_pretrained,
    load_weights,
    save_checkpoint,
)

NAME, ARGUMENTS = "avit_nano", {"num_classes": 5, "gamma": 3.0, "beta": -2.0}
PUBLISHED = "deit_tiny_patch16_224.fb_in1k"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model(NAME, **ARGUMENTS)


# ---- what is written is what is read ----


def test_a_plain_model_starts_one_that_halts(tmp_path):
    plain = timm.create_model("deit_nano").state_dict()
    path = tmp_path / "deit.pth"  # as DataParallel and torch.save leave it
    torch.save({"model": {f"module.{key}": value for key, value in plain.items()}}, path)
    model = timm.create_model(NAME, beta=-9.0)
    load_weights(model, path)
    assert model.beta == -9.0
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in plain.items())


def test_weights_of_another_model_that_halts_leave_the_settings_as_they_are(model, tmp_path):
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, model, NAME, ARGUMENTS)
    other = timm.create_model(NAME, num_classes=5, beta=-9.0)
    load_weights(other, path)
    assert (other.gamma, other.beta) == (5.0, -9.0)
    assert torch.equal(other.head.weight, model.head.weight)


def test_weights_that_are_no_real_numbers_are_refused(model, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({name: value.char() for name, value in model.state_dict().items()}, path)
    with refused("has weights that are no real numbers; delete beta"):
        load_weights(model, path)
    path = path.with_suffix(".pth")
    torch.save({"epoch": 3}, path)
    with refused("nor a state dict"):
        load_weights(model, path)


def test_a_description_of_a_run_that_makes_no_sense_is_refused(model, tmp_path):
    path = tmp_path / "last.safetensors"
    for run in ({"seed": "three"}, {"classes": "cats"}, None):
        save_checkpoint(path, model, NAME, ARGUMENTS, run=run)
        with refused("last.json does not describe a model"):
            load_checkpoint(path)


# ---- pretrained weights, from a folder or timm's hub ----


@pytest.mark.parametrize("classes", [5, 9])
def test_other_classes_get_a_new_head_though_they_may_be_as_many(
    classes, model, tmp_path, monkeypatch
):
    source = timm.create_model("deit_nano", num_classes=classes)
    save_file(source.state_dict(), tmp_path / "some_deit.safetensors")
    monkeypatch.setenv("AVIT_WEIGHTS", str(tmp_path))
    head = model.head.weight.clone()
    load_pretrained(model, "some_deit", new_head=True)
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert torch.equal(model.head.weight, head)
    if classes == len(head):
        load_pretrained(model, "some_deit")
        assert torch.equal(model.head.weight, source.head.weight)
    else:
        with refused("is of another model"):
            load_pretrained(model, "some_deit")


@pytest.mark.parametrize("name", [PUBLISHED, "nobody", "test_vit4"])
def test_without_weights_and_network_both_ways_are_named(name, tmp_path, monkeypatch):
    monkeypatch.setenv("AVIT_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    model = timm.create_model(PUBLISHED, depth=1)
    with refused("hub has none or is out of reach; work in a clone of the repository, put the"):
        load_pretrained(model, name)
