"""The committed models: half the size, the same model but for rounding, taken where none was
trained.
"""

import shutil

import pytest
import torch

from avit_lib.errors import UserError
from avit_lib.study import Study, inspecting
from avit_lib.study.releasing import release, released
from avit_lib.training import load_checkpoint


def test_a_committed_model_is_the_trained_one_in_half_precision(tmp_path, monkeypatch):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path / "results"))
    profile = str(tmp_path / "mine.toml")
    (tmp_path / "mine.toml").write_text('extends = "smoke"\npurpose = "mine"\nlicence = "MIT"\n')
    study = Study(profile, source="release")
    study.train_chain(focus := study.profile.focus)
    table = release(study)
    assert list(table["model"]) == ["DeiT fine-tuned", "A-ViT halting trained"]
    assert (table["accuracy, as committed"] - table["accuracy, as trained"]).abs().max() <= 0.02
    path, trained = released("mine", focus), study.checkpoint(focus)
    assert path.stat().st_size < 0.6 * trained.stat().st_size
    model, described = load_checkpoint(path)
    whole = load_checkpoint(trained)[0].state_dict()
    assert described["licence"] == "MIT"
    exact = getattr(model, "exact", ())
    for name, value in model.state_dict().items():
        rounded = whole[name] if name in exact else whole[name].half().float()
        assert value.dtype == torch.float32 and torch.equal(value, rounded)
    assert inspecting.load(profile, 0, "cpu", None, None)[2] == trained
    shutil.rmtree(study.folder(focus))
    assert inspecting.load(profile, 0, "cpu", None, None)[2] == path


def test_weights_without_a_licence_are_not_released(tmp_path):
    (tmp_path / "mine.toml").write_text('extends = "smoke"\nlicence = ""\n')
    with pytest.raises(UserError, match="profile mine has no licence"):
        release(Study(str(tmp_path / "mine.toml")))
