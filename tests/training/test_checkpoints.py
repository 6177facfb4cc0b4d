"""Checkpoints: what is written is what is read, and every fault is named in one line."""

import json
from hashlib import sha256

import pytest
import timm
import torch
from safetensors.torch import save_file

from avit_lib.adaptive import without_thresholds
from avit_lib.errors import UserError
from avit_lib.training.checkpoints import (
    load_checkpoint,
    load_pretrained,
    load_weights,
    save_checkpoint,
)

NAME, ARGUMENTS = "avit_nano", {"num_classes": 5, "gamma": 3.0, "beta": -2.0}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model(NAME, **ARGUMENTS)


@pytest.fixture
def saved(model, tmp_path):
    """The path of a whole checkpoint of ``model``."""
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, model, NAME, ARGUMENTS, epoch=3)
    return path


def assert_one_line(error, path):
    """The message is one line that names the file."""
    message = str(error.value)
    assert path.name in message and "\n" not in message


def test_round_trip(model, saved):
    found, description = load_checkpoint(saved)
    assert not found.training and (found.gamma, found.beta) == (3.0, -2.0)
    assert description["epoch"] == 3 and description["model"] == NAME
    for key, value in model.state_dict().items():
        assert torch.equal(value, found.state_dict()[key])
    assert sorted(path.name for path in saved.parent.iterdir()) == ["last.json", "last.safetensors"]


def test_what_was_set_after_the_model_was_made_is_kept(model, tmp_path):
    model.gamma, model.beta, model.eps = 4.0, -7.5, 0.25
    save_checkpoint(tmp_path / "calibrated.safetensors", model, NAME, ARGUMENTS)
    found, _ = load_checkpoint(tmp_path / "calibrated.safetensors")
    assert (found.gamma, found.beta, found.eps) == (4.0, -7.5, 0.25)


def test_of_a_file_without_halting_settings_the_arguments_set_them(model, tmp_path):
    """As A-ViTs were written once."""
    for name in ("gamma", "beta", "eps"):
        delattr(model, name)
    save_checkpoint(tmp_path / "old.safetensors", model, NAME, ARGUMENTS)
    found, _ = load_checkpoint(tmp_path / "old.safetensors")
    assert (found.gamma, found.beta) == (3.0, -2.0)


@pytest.mark.parametrize("older", [False, True])
def test_an_adapted_model_is_found_again_also_when_the_json_alone_weighs_importance(
    older, tmp_path
):
    plain = timm.create_model("deit_nano")
    model = without_thresholds(plain, importance_weight=0.5)
    model.thresholds.fill_(0.75)
    path = tmp_path / "adapted.safetensors"
    save_checkpoint(path, model, "deit_nano", {})
    if older:
        weights = model.state_dict()
        del weights["importance_weight"]
        save_file(weights, path)
        facts = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(
            json.dumps(facts | {"sha256": sha256(path.read_bytes()).hexdigest()})
        )
    found, _ = load_checkpoint(path)
    assert found.importance_weight == 0.5 and (found.thresholds == 0.75).all()


def test_weights_of_another_model_that_halts_leave_the_settings_as_they_are(saved, model):
    other = timm.create_model(NAME, num_classes=5, beta=-9.0, class_token_halts=False)
    load_weights(other, saved)
    assert (other.gamma, other.beta, other.rule.class_token_halts) == (5.0, -9.0, False)
    assert torch.equal(other.head.weight, model.head.weight)


@pytest.mark.parametrize("projection", [False, True])
def test_a_plain_model_starts_an_adaptive_one(tmp_path, projection):
    torch.manual_seed(1)
    plain = timm.create_model("deit_nano")
    path = tmp_path / "deit.safetensors"
    save_checkpoint(path, plain, "deit_nano", {})
    model = timm.create_model(NAME, projection=projection)
    load_weights(model, path)
    if projection:
        assert model.direction.tolist() == [1.0] + [0.0] * (model.embed_dim - 1)  # channel 0
    assert all(
        torch.equal(value, model.state_dict()[key]) for key, value in plain.state_dict().items()
    )


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_truncated(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(UserError) as error:
        load_checkpoint(saved)
    assert_one_line(error, saved)


def test_not_a_checkpoint_at_all(saved):
    saved.write_bytes(b"\x80\x02 certainly no tensors\n" * 50)
    with pytest.raises(UserError) as error:
        load_checkpoint(saved)
    assert_one_line(error, saved)


def test_one_changed_byte_is_noticed(saved):
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1
    saved.write_bytes(content)
    with pytest.raises(UserError, match="checksum") as error:
        load_checkpoint(saved)
    assert_one_line(error, saved)


@pytest.mark.parametrize("name", ["last.safetensors", "last.json"])
def test_a_missing_file(saved, name):
    (saved.parent / name).unlink()
    with pytest.raises(UserError, match="missing") as error:
        load_checkpoint(saved)
    assert_one_line(error, saved.parent / name)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b""])
def test_a_damaged_description(saved, content):
    path = saved.with_suffix(".json")
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged") as error:
        load_checkpoint(saved)
    assert_one_line(error, path)


@pytest.mark.parametrize(
    "other, message",
    [({"num_classes": 6}, "number of classes"), ({"class_token_halts": False}, "halts otherwise")],
)
def test_a_description_of_another_model(saved, other, message):
    path = saved.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"arguments": ARGUMENTS | other}))
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(saved)
    assert_one_line(error, saved)


@pytest.mark.parametrize(
    "other, message",
    [
        ({"num_classes": 6}, "number of classes"),
        ({"embed_dim": 32}, "shape"),
        ({"depth": 5}, "lacks"),
        ({"depth": 3}, "to spare"),
    ],
)
def test_foreign_weights(saved, other, message):
    model = timm.create_model(NAME, **({"num_classes": 5} | other))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as error:
        load_weights(model, saved)
    assert_one_line(error, saved)
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items()
    )  # untouched


def test_pretrained_weights_from_a_folder_keep_a_head_of_another_size(model, tmp_path, monkeypatch):
    source = timm.create_model("deit_nano", num_classes=9)
    save_checkpoint(tmp_path / "some_deit.safetensors", source, "deit_nano", {})
    monkeypatch.setenv("AVIT_WEIGHTS", str(tmp_path))
    head = model.head.weight.clone()
    load_pretrained(model, "some_deit")
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert torch.equal(model.head.weight, head)
