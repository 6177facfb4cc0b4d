"""A study: what its runs start from, when they are trained again, what is written of them."""

import json
import runpy
from dataclasses import replace

import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT, channels, random_images, refused
from matplotlib.figure import Figure
from msgspec import structs
from PIL import Image

from avit_lib import load
from avit_lib.adaptive import NEVER
from avit_lib.data import STATISTICS, TrainingData
from avit_lib.data.images import CROP_FRACTION
from avit_lib.peers.tome import merge_tokens
from avit_lib.places import digest_file, weights_file
from avit_lib.study import Sentence, Study, get_profile
from avit_lib.study.results import Results, to_markdown
from avit_lib.study.study import pretrained, released

DATA = TrainingData(random_images(64), random_images(32, seed=1), {"sha256": "", "content": {}}, 28)


@pytest.fixture
def open_study(small_profile, tmp_path, monkeypatch):
    """Makes a study of small models on images of noise, whose profile has some lines more."""
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path / "results"))

    def open_study(text="", data=DATA):
        path = tmp_path / "mine.toml"
        path.write_text(f"extends = '{small_profile}'\n{text}\n")
        study = Study(str(path), 1, device="cpu")
        study.data = data
        return study

    return open_study


def test_a_training_is_kept_until_its_settings_or_images_change(open_study, capsys):
    study = open_study()
    with refused("has not been trained to the end, in profile mine: run"):
        study.load("avit_finetuned")
    history = study.train("avit_finetuned")
    trained = {path.name for path in study.folder("deit").parent.iterdir()}
    assert "train_distillation" in history and trained == {"avit_finetuned", "deit"}
    before = study.checkpoint("avit_finetuned").stat().st_mtime_ns

    study = open_study()
    pd.testing.assert_frame_equal(study.train("avit_finetuned"), history)
    assert study.checkpoint("avit_finetuned").stat().st_mtime_ns == before

    changed = "runs.avit_finetuned.halting.alpha_distr = 0.3"
    other = replace(DATA, split=DATA.split | {"content": {"train": "another digest"}})
    for study, again in ((open_study(changed), 1), (open_study(changed, other), 2)):
        with refused("changed since it was trained"):
            study.checkpoint("avit_finetuned")
        capsys.readouterr()
        study.train("avit_finetuned")  # and deit, if that is of other images, too
        assert capsys.readouterr().out.count("images changed; training again") == again

    known = study.folder("deit") / "last.json"  # as an editor saves it, with a mark of its encoding
    known.write_text("\ufeff" + known.read_text().replace('"epoch": 2', '"epoch": 1'))
    with refused("DeiT fine-tuned has not been trained to the end"):
        study.checkpoint("deit")  # of two epochs: it was interrupted


def test_predictions_are_kept_until_weights_images_or_label_change(open_study, monkeypatch):
    def open_it(images=32):
        study = open_study()
        study.test = random_images(images, seed=2)
        return study

    def predict(study, label="mine"):
        asked.clear()
        found = study.predict_test(label, model)
        return len(asked), found

    asked, plain = [], Study.predict
    monkeypatch.setattr(Study, "predict", lambda *given: asked.append(given) or plain(*given))
    model = timm.create_model("avit_nano", num_classes=4)
    count, first = predict(open_it())
    assert count == 1 and first.depth.max() <= first.layers == len(model.blocks)
    count, again = predict(open_it())
    assert count == 0 and all(
        torch.equal(getattr(first, name), getattr(again, name))
        for name in ("logits", "labels", "depth", "flops", "means", "predicted", "mean_depth")
    )
    assert [predict(open_it(16))[0], predict(open_it(), "another")[0]] == [1, 1]
    assert [predict(open_it())[0], predict(open_it())[0]] == [1, 0]  # the smaller set was last
    model.beta = 10.0  # all halt at once
    count, later = predict(open_it())
    assert count == 1 and not torch.equal(later.depth, first.depth)
    model = merge_tokens(timm.create_model("deit_nano", num_classes=4), 2)
    assert [predict(open_it())[0], predict(open_it())[0]] == [1, 0]
    for path in (open_it().folder("deit").parent / "predictions").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert predict(open_it())[0] == 1


def test_a_fitted_channel_is_held_or_trained(open_study):
    study = open_study()
    for name, held in (("avit_held", True), ("avit_finetuned", False)):
        study.train(name)
        run = study.profile.run(name)
        fitted = channels(study.initial_model(run))
        assert all(map(torch.equal, channels(study.load(name)), fitted)) == held
    halting = structs.replace(run.halting, start="beta", channel_rate=1.0)
    unfitted = structs.replace(run, halting=halting)
    assert not all(map(torch.equal, channels(study.initial_model(unfitted)), fitted))


def test_weights_that_expect_other_images_are_refused(open_study):
    study = open_study()
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    with refused(r"expects images of mean \(0.5, 0.5, 0.5\)"):
        study.initial_model(structs.replace(study.profile.run("deit"), pretrained=name))


def test_other_weights_in_data_are_another_run_but_for_embedded_ones(tmp_path, monkeypatch):
    (tmp_path / "avit_lib").mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AVIT_WEIGHTS", raising=False)
    run = structs.replace(get_profile("smoke").run("deit"), pretrained="some")
    weights = weights_file("some")
    assert pretrained(run) == ""  # timm's
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"one")
    assert pretrained(run) == digest_file(weights)
    (tmp_path / "data" / "SHA256SUMS").write_text(f"{digest_file(weights)}  weights/{weights.name}")
    assert pretrained(run) == ""


def test_a_run_that_merges_is_adapted_before_it_is_trained(open_study):
    study = open_study()
    study.train("merging")
    start, trained = study.initial_model(study.profile.run("merging")), study.load("merging")
    assert torch.equal(trained.thresholds, start.thresholds) and trained.thresholds.min() < NEVER
    assert not torch.equal(trained.head.weight, start.head.weight)


def test_a_released_model_is_the_trained_one_in_half_precision(open_study):
    script = runpy.run_path(str(ROOT / "scripts" / "release.py"))
    study = open_study("licence = 'MIT'")
    study.test = random_images(40, seed=2)
    study.train("avit_finetuned")
    table = script["release"](study)
    assert list(table["model"]) == ["DeiT fine-tuned", "A-ViT halting trained"]
    assert (table["accuracy, as committed"] - table["accuracy, as trained"]).abs().max() <= 0.05
    path = released("mine", "avit_finetuned")
    card = (path.parent / "README.md").read_text()
    assert "license: mit" in card and f"accuracy is {table.iloc[1, 2]:.1%}" in card
    assert f'"local-dir:{path.parent}"' in card
    model, described = load(path)
    assert described["licence"] == "MIT"
    exact = ("gamma", "beta", "eps")
    for name, value in study.load("avit_finetuned").state_dict().items():
        wanted = value if name in exact else value.half().float()
        assert torch.equal(model.state_dict()[name], wanted), name
    of_timm = timm.create_model(f"local-dir:{path.parent}", pretrained=True).eval()
    images = study.test[torch.arange(4)][0]
    assert torch.equal(of_timm(images), model(images))
    told = of_timm.pretrained_cfg
    assert told["label_names"] == described["run"]["classes"]
    assert (tuple(told["mean"]), tuple(told["std"])) == STATISTICS
    assert told["crop_pct"] == CROP_FRACTION


def test_speeds_of_another_machine_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    results = Results("mine", 3, "04_evaluation")
    results.table(pd.DataFrame({"images_per_second": [1.0]}), "speed", "Speeds.")
    results.table(pd.DataFrame({"accuracy": [1.0]}), "answers", "Answers.")
    monkeypatch.setattr("avit_lib.study.results.hardware", lambda: "a GPU")
    assert len(results.read("answers")) == len(results.read("speed", here=False)) == 1
    results.metrics({}, "answers")  # what a run writes before it fails makes others no newer
    with refused("speed.csv is of hardware .*, not a GPU; run notebook 04_evaluation again"):
        results.read("speed")


PAGE = """What it is.

| model   |   accuracy |    n |
|:--------|-----------:|-----:|
| 1e9     |     0.1235 | 1200 |
| b       |            |    2 |

Made by 04_evaluation.
"""


def test_results_say_where_they_come_from(tmp_path, monkeypatch):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    results, folder = Results("mine", 3, "04_evaluation"), tmp_path / "mine"
    frame = pd.DataFrame({"model": ["1e9", "b"], "accuracy": [0.123456789, None], "n": [1200, 2]})
    assert results.table(frame, "04_short", "What\n  it is.") is frame
    assert (folder / "tables" / "04_short.md").read_text() == PAGE
    assert results.read("04_short")["accuracy"][0] == 0.123457
    heading = to_markdown(frame[:0]).splitlines()[0]
    assert heading.split() == ["|", "model", "|", "accuracy", "|", "n", "|"]
    with refused(r"other\.csv is missing; run the notebooks before"):
        results.read("other")
    with refused("04_short.csv is of seed 3, not 4; run notebook 04_evaluation again"):
        Results("mine", 4, "05_halting_analysis").read("04_short")

    results.figure(Figure(figsize=(1, 1)), "04_points", "Points.")
    with Image.open(folder / "figures" / "04_points.png") as picture:
        assert picture.info.items() >= {"Description": "Points.", "Source": "04_evaluation"}.items()

    said = results.finding("It is\n  so.", "04_so")
    assert isinstance(said, Sentence) and said == "It is so."
    (origin,) = (folder / "provenance").iterdir()
    facts = json.loads(origin.read_text())
    assert origin.name == "04_evaluation.json" and facts["seed"] == 3 and facts["seconds"] >= 0
    assert len(facts["commit"]) == 40 and set(facts["packages"]) >= {"torch", "timm"}
