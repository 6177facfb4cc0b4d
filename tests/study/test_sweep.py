"""The sweep over seeds, on the smoke profile: what is trained when, and what is written."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from avit_lib.cli import main
from avit_lib.study import Study, settings
from avit_lib.study.sweep import summary_table, sweep_table, with_differences

TEXT = (settings.PROFILES / "smoke.toml").read_text()


def declare(folder: Path, changes: dict[str, str] | None = None) -> str:
    """The file of a profile ``mine``: the text of the smoke profile with ``changes``, from and
    to.
    """
    text = TEXT
    for before, after in (changes or {}).items():
        assert before in text
        text = text.replace(before, after)
    (folder / "mine.toml").write_text(text)
    return str(folder / "mine.toml")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Where the library now looks for the results of ``mine``."""
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    return tmp_path / "mine"


@pytest.fixture
def trained(monkeypatch):
    """The names of the runs that are trained from now on."""
    names, train = [], Study.train

    def watching(self, name):
        epochs = self.folder(name) / "last.json"
        before = epochs.stat().st_mtime_ns if epochs.is_file() else None
        history = train(self, name)
        if epochs.stat().st_mtime_ns != before:
            names.append(f"{name} {self.seed}")
        return history

    monkeypatch.setattr(Study, "train", watching)
    return names


def test_a_profile_that_declares_nothing_says_so(results, tmp_path, capsys):
    assert (
        main(["sweep", "--profile", declare(tmp_path, {'["deit", "avit_finetuned"]': "[]"})]) == 2
    )
    error = capsys.readouterr().err
    assert "in its file, as sweep = " in error and error.count("\n") == 1
    assert not results.exists()


UNTRAINED = ["ToMe, r = 1", "Adaptive merging, 36% saved"]  # what follows from the DeiT


@pytest.fixture
def speeds(results):
    """What notebook 04 measures before: that the fine-tuned A-ViT is twice as fast as the DeiT."""
    names = ["DeiT fine-tuned", "A-ViT halting trained", "ToMe, r = 1"]
    models = pd.DataFrame({"model": names * 2, "batch": [1] * 3 + [32] * 3})
    (results / "tables").mkdir(parents=True)
    models.assign(speedup=[1.0, 9.0, 9.0, 1.0, 2.0, 1.5]).to_csv(
        results / "tables" / "speed.csv", index=False
    )


def test_the_sweep_asks_for_the_speeds_first(results, tmp_path, trained, capsys):
    assert main(["sweep", "--profile", declare(tmp_path)]) == 2
    assert (
        "speed.csv is missing; run the notebooks before" in capsys.readouterr().err
        and trained == []
    )


@pytest.mark.usefixtures("speeds")
def test_the_sweep_trains_every_seed_once(results, trained, tmp_path):
    command = ["sweep", "--profile", declare(tmp_path)]
    assert main(command) == 0
    assert trained == ["deit 0", "avit_finetuned 0", "deit 1", "avit_finetuned 1"]
    assert (results / "checkpoints" / "seed1" / "deit" / "last.safetensors").is_file()
    assert not (results / "checkpoints" / "seed0").exists()
    table = pd.read_csv(results / "tables" / "sweep.csv")
    turned = ["A-ViT halting trained, depth 9"]
    assert table["model"].tolist() == [
        "DeiT fine-tuned",
        *UNTRAINED,
        "A-ViT halting trained",
        *turned,
    ]
    assert table["method"].tolist() == ["plain", "peer", "ours", "paper", "paper"]
    assert set(table["seeds"]) == {"0 1"} and table["accuracy_std"].gt(0).any()
    assert table["flops_saved"][0] == 0 and table["flops_saved"][1:].gt(0).all()
    seeds = pd.read_csv(results / "tables" / "sweep_seeds.csv")
    short = pd.read_csv(results / "tables" / "sweep_short.csv")
    assert short["model"].tolist() == ["DeiT fine-tuned", "ToMe, r = 1", "A-ViT halting trained"]
    assert short["speed-up, measured"].tolist() == [1.0, 1.5, 2.0]
    found = (results / "findings" / "sweep_avit_finetuned.md").read_text()
    nearest = r"ToMe, r = 1 \([\d.]+ %; 1\.50 times as fast, the nearest in speed\)"
    assert "2.00 times as fast as DeiT fine-tuned" in found and re.search(nearest, found)
    assert len(seeds) == 10 and set(seeds["minus_deit"][seeds["model"] == "DeiT fine-tuned"]) == {
        0.0
    }
    before = (results / "tables" / "sweep.csv").read_bytes()
    del trained[:]
    assert main(command) == 0
    assert trained == [] and (results / "tables" / "sweep.csv").read_bytes() == before
    shutil.rmtree(results / "checkpoints")  # what is on record needs no checkpoint
    assert main(command) == 0
    assert trained == [] and (results / "tables" / "sweep.csv").read_bytes() == before
    declare(tmp_path, {"avit_finetuned = [9.0]": "avit_finetuned = [8.0]"})
    assert main(command) == 0 and trained == [
        "deit 0",
        "avit_finetuned 0",
        "deit 1",
        "avit_finetuned 1",
    ]


def test_mean_and_deviation_by_hand():
    figures = pd.DataFrame(
        {
            "model": ["b", "a", "b"],
            "method": "paper",
            "seed": [0, 0, 1],
            "accuracy": [0.5, 0.25, 0.75],
        }
    )
    table = sweep_table(figures)
    assert table["model"].tolist() == ["b", "a"] and table["seeds"].tolist() == ["0 1", "0"]
    assert table["accuracy"].tolist() == [0.625, 0.25]
    assert table["accuracy_std"][0] == pytest.approx(0.125 * 2**0.5) and pd.isna(
        table["accuracy_std"][1]
    )


def test_differences_are_of_the_same_seed():
    rows = pd.DataFrame(
        {"model": ["b", "a"] * 2, "seed": [1, 1, 0, 0], "accuracy_macro": [0.5, 0.75, 0.25, 0.125]}
    )
    found = with_differences(rows, {"b": "plain"})
    assert found["minus_plain"].tolist() == [0, 0.25, 0, -0.125] and found.columns[
        :3
    ].tolist() == list(rows)


def test_the_sweep_in_words():
    rows = pd.DataFrame(
        {"model": ["D", "A"] * 2, "seed": [0, 0, 1, 1], "accuracy_macro": [0.5, 0.46, 0.52, 0.5]}
    )
    rows = rows.assign(method="paper", accuracy=0.75, mean_depth=6.0, flops_saved=0.25)
    words = summary_table(sweep_table(with_differences(rows, {"D": "deit"})), {"D": "deit"})
    assert (
        words["minus D [points]"].tolist() == ["", "-3.00 ± 1.41"]
        and words["seeds"].tolist() == ["0 1"] * 2
    )
    assert words["mean per-class accuracy [%]"].tolist() == ["51.0 ± 1.4", "48.0 ± 2.8"]
    assert words["FLOPs saved [%]"].tolist() == ["25.0 ± 0.0"] * 2
