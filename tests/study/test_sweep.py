"""The search for settings and the sweep over seeds, on the smoke profile: what is trained when, and what is written."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pandas as pd
import pytest

from avit_lib.cli import main
from avit_lib.errors import UserError
from avit_lib.study import Study, get_profile, search, settings, study
from avit_lib.study.search import summary_table, sweep_table, with_differences
from avit_lib.study.settings import profile_names
from avit_lib.training import read_json

TEXT = (settings.PROFILES / "smoke.toml").read_text()
SMOKE = get_profile("smoke")


def declare(folder: Path, changes: dict[str, str] | None = None) -> str:
    """The file of a profile ``mine``: the text of the smoke profile with ``changes``, from and to."""
    text = TEXT
    for before, after in (changes or {}).items():
        assert before in text
        text = text.replace(before, after)
    (folder / "mine.toml").write_text(text)
    return str(folder / "mine.toml")


def refuse(*_):
    raise AssertionError("the search must not look at the test images")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The results of a finished search."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AVIT_RESULTS", str(folder))
        patch.setattr(study, "test_data", refuse)
        assert main(["search", "--profile", declare(folder)]) == 0
    return folder / "mine"


@pytest.fixture
def results(searched, tmp_path, monkeypatch):
    """A copy of these results that a test may change, and where the library now looks for them."""
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    return shutil.copytree(searched, tmp_path / "mine")


@pytest.fixture
def run_search(tmp_path):
    """Runs the command with changes of the profile's file; returns the exit status."""

    def command(*options: str, changes: dict[str, str] | None = None) -> int:
        return main(["search", "--profile", declare(tmp_path, changes), *options])

    return command


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


def test_the_table_has_a_row_a_candidate_and_the_settings_that_differ(searched):
    table = pd.read_csv(searched / "tables" / "search.csv")
    assert table["candidate"].tolist() == [run.label for run in SMOKE.search]
    assert (searched / "figures" / "search.png").is_file()
    words = (searched / "findings" / "search_reached.md").read_text()
    for row in table.itertuples():
        assert f"*{row.candidate}* {row.accuracy:.1%}, {row.flops_saved:.0%} saved" in words
    assert {"halting.beta", "halting.ponder_ramp", "teacher", "distillation.alpha"} <= set(table.columns)
    assert not {"training.epochs", "model", "halting.gamma", "label"} & set(table.columns)
    assert table["halting.beta"].tolist() == [-2, -3]
    assert table["distillation.alpha"].isna().tolist() == [True, False]  # nobody teaches the first
    assert table["accuracy"].between(0, 1).all()
    assert table["mean_executed_depth"].between(1, 4).all() and table["flops_saved"].between(0, 1).all()
    facts = read_json(searched / "tables" / "search.json")
    assert facts["provenance"]["source"] == "search" and "validation" in facts["caption"]


def test_figures_are_those_of_the_validation_images(searched):
    history = pd.read_csv(searched / "checkpoints" / "search" / "higher_beta" / "history.csv").iloc[-1]
    row = pd.read_csv(searched / "tables" / "search.csv").iloc[0]
    for name in ("accuracy", "accuracy_macro", "mean_depth"):
        assert row[name] == pytest.approx(history[f"val_{name}"], rel=1e-4)
    assert row["minutes"] == pytest.approx(history["seconds"] / 60, rel=1e-5)  # of its one epoch; written in 6 digits


def test_a_taught_candidate_follows_its_teacher(searched):
    folders = searched / "checkpoints" / "search"
    taught, alone = (pd.read_csv(folders / name / "history.csv") for name in ("taught", "higher_beta"))
    assert (taught["train_distillation"] > 0).all() and "train_distillation" not in alone
    teacher = read_json(searched / "checkpoints" / "deit" / "last.json")["sha256"]
    assert read_json(folders / "taught" / "last.json")["run"]["teacher"] == teacher
    assert read_json(folders / "taught" / "last.json")["run"]["start"] == teacher


def test_what_is_on_record_is_not_trained_again(results, trained, run_search, capsys):
    before = (results / "tables" / "search.json").read_bytes()
    shutil.rmtree(results / "checkpoints")  # as in a fresh clone
    assert run_search() == 0
    assert trained == [] and "on record" in capsys.readouterr().out
    assert (results / "tables" / "search.json").read_bytes() == before


def test_a_longer_list_trains_what_is_new_and_keeps_the_rest(results, trained, run_search):
    before = pd.read_csv(results / "tables" / "search.csv")
    changes = {"[search.higher_beta]": "[search.new]", "beta -2": "beta -1", "beta = -2.0": "beta = -1.0"}
    assert run_search(changes=changes) == 0  # so one is no longer declared
    assert trained == ["new 0"]
    table = pd.read_csv(results / "tables" / "search.csv").set_index("candidate")
    assert table.index.tolist() == ["beta -1", SMOKE.search[1].label, SMOKE.search[0].label]
    assert table.loc[before["candidate"], "accuracy"].tolist() == before["accuracy"].tolist()


def test_a_candidate_with_other_settings_is_trained_again(results, trained, run_search):
    assert run_search(changes={"beta = -2.0": "beta = -1.5"}) == 0
    assert trained == ["higher_beta 0"]
    assert pd.read_csv(results / "tables" / "search.csv")["halting.beta"].tolist() == [-1.5, -3]


def test_another_name_or_run_of_the_notebooks_changes_no_candidate(results, trained, run_search):
    assert run_search(changes={"beta -2": "a beta of -2", 'label = "DeiT trained longer"': 'label = "longer"'}) == 0
    assert trained == []


def test_other_images_and_another_seed_are_another_search(results, trained, run_search):
    assert run_search("--seed", "1") == 0
    assert trained == ["deit 1", "higher_beta 1", "taught 1"]
    assert run_search("--seed", "1", changes={"train_per_class = 20": "train_per_class = 19"}) == 0
    assert trained[3:] == ["deit 1", "higher_beta 1", "taught 1"]


def test_a_setting_younger_than_the_record_has_its_default(results, trained, run_search):
    path = results / "metrics" / "search.json"
    content = read_json(path)
    del content["candidates"]["higher_beta"]["run"]["halting"]["ponder_ramp"]
    path.write_text(json.dumps(content))
    assert run_search() == 0
    assert trained == []


def test_an_interrupted_search_goes_on(tmp_path, trained, run_search, monkeypatch):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(settings, "Teacher", interrupt)  # the second candidate has one
        assert run_search() == 130
    assert len(pd.read_csv(tmp_path / "mine" / "tables" / "search.csv")) == 1
    assert run_search() == 0
    assert trained == ["deit 0", "higher_beta 0", "taught 0"]


def test_a_damaged_record_is_not_overwritten(results, run_search, capsys):
    path = results / "metrics" / "search.json"
    path.write_text("{")
    assert run_search() == 2
    assert "search.json is damaged" in capsys.readouterr().err
    assert path.read_text() == "{"


@pytest.mark.parametrize("command", ["search", "sweep"])
def test_a_profile_that_declares_nothing_says_so(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path / "results"))
    file = tmp_path / "none.toml"
    file.write_text(TEXT[: TEXT.index("[search.")].replace('sweep = ["deit", "avit_finetuned"]', ""))
    assert main([command, "--profile", str(file)]) == 2
    error = capsys.readouterr().err
    assert "in its file, as " in error and f"{command}" in error and error.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_settings_of_a_plain_candidate_have_no_halting(searched):
    record = read_json(searched / "metrics" / "search.json")["candidates"]
    record["x"] = record["higher_beta"] | {"run": msgspec.to_builtins(SMOKE.run("deit"))}
    table = search.search_table(SimpleNamespace(profile=SMOKE), record)
    idle = table.loc[:, table.columns.str.startswith(("halting", "distillation"))]
    assert {"halting.beta", "distillation.alpha"} <= set(idle) and "halting" not in idle
    assert idle.iloc[2].isna().all() and idle.iloc[1].notna().all()


def test_a_setting_since_gone_stays_on_record(searched):
    record = read_json(searched / "metrics" / "search.json")["candidates"]
    record["higher_beta"]["run"]["halting"]["start"] = "both"
    assert "both" in set(search.search_table(SimpleNamespace(profile=SMOKE), record)["halting.start"])


def test_a_run_whose_teacher_is_not_there_is_refused(tmp_path):
    run = SMOKE.search[1]
    with pytest.raises(UserError, match=r"learns from run 'deit'.*--teacher"):
        study.train_run(run, None, tmp_path / "run", tmp_path / "start.safetensors", None, 0, "cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", profile_names())
def test_every_run_and_candidate_has_a_folder_of_its_own(name):
    profile = get_profile(name)
    names = [run.name for run in (*profile.runs, *(run for run in profile.search if run not in profile.runs))]
    assert len(set(names)) == len(names)
    assert not [run for run in names if run.startswith(("search", "seed"))]  # folders of their own
    assert set(profile.sweep) <= set(names)


# --- the sweep --------------------------------------------------------------------------------------------------------

UNTRAINED = ["ToMe, r = 2", "Adaptive merging, 22% saved"]  # what follows from the DeiT


@pytest.fixture
def speeds(results):
    """What notebook 04 measures before: that the fine-tuned A-ViT is twice as fast as the DeiT."""
    models = pd.DataFrame({"model": ["DeiT", "A-ViT fine-tuned", "ToMe, r = 2"] * 2, "batch": [1] * 3 + [32] * 3})
    (results / "tables").mkdir(exist_ok=True)
    models.assign(speedup=[1.0, 9.0, 9.0, 1.0, 2.0, 1.5]).to_csv(results / "tables" / "speed.csv", index=False)


def test_the_sweep_asks_for_the_speeds_first(results, tmp_path, trained, capsys):
    assert main(["sweep", "--profile", declare(tmp_path)]) == 2
    assert "speed.csv is missing; run the notebooks before" in capsys.readouterr().err and trained == []


@pytest.mark.usefixtures("speeds")
def test_the_sweep_trains_every_seed_once(results, trained, tmp_path):
    command = ["sweep", "--profile", declare(tmp_path)]
    assert main(command) == 0
    assert trained == ["avit_finetuned 0", "deit 1", "avit_finetuned 1"]
    assert (results / "checkpoints" / "seed1" / "deit" / "last.safetensors").is_file()
    assert not (results / "checkpoints" / "seed0").exists()
    table = pd.read_csv(results / "tables" / "sweep.csv")
    turned = ["A-ViT fine-tuned, depth 2", "A-ViT fine-tuned, depth 3"]
    assert table["model"].tolist() == ["DeiT", *UNTRAINED, "A-ViT fine-tuned", *turned]
    assert table["method"].tolist() == ["plain", "peer", "ours", "paper", "paper", "paper"]
    assert set(table["seeds"]) == {"0 1"} and table["accuracy_std"].gt(0).any()
    assert table["flops_saved"][0] == 0 and table["flops_saved"][1:].gt(0).all()
    assert table["mean_depth"][4] < table["mean_depth"][5]
    seeds = pd.read_csv(results / "tables" / "sweep_seeds.csv")
    short = pd.read_csv(results / "tables" / "sweep_short.csv")
    assert short["model"].tolist() == ["DeiT", "ToMe, r = 2", "A-ViT fine-tuned"]
    assert short["speed-up, measured"].tolist() == [1.0, 1.5, 2.0]
    found = (results / "findings" / "sweep_avit_finetuned.md").read_text()
    nearest = r"ToMe, r = 2 \([\d.]+ %; 1\.50 times as fast, the nearest in speed\)"
    assert "2.00 times as fast as DeiT" in found and re.search(nearest, found)
    assert len(seeds) == 12 and set(seeds["minus_deit"][seeds["model"] == "DeiT"]) == {0.0}
    before = (results / "tables" / "sweep.csv").read_bytes()
    del trained[:]
    assert main(command) == 0
    assert trained == [] and (results / "tables" / "sweep.csv").read_bytes() == before
    shutil.rmtree(results / "checkpoints")  # what is on record needs no checkpoint
    assert main(command) == 0
    assert trained == [] and (results / "tables" / "sweep.csv").read_bytes() == before
    declare(tmp_path, {"recalibrated.avit_finetuned = [2.0, 3.0]": "recalibrated.avit_finetuned = [2.5]"})
    assert main(command) == 0 and trained == ["deit 0", "avit_finetuned 0", "deit 1", "avit_finetuned 1"]


@pytest.mark.usefixtures("speeds")
def test_a_candidate_of_the_search_is_swept_like_a_run(results, trained, tmp_path):
    sweep = {'sweep = ["deit", "avit_finetuned"]': 'sweep = ["deit", "taught"]'}
    assert main(["sweep", "--profile", declare(tmp_path, sweep)]) == 0
    assert trained == ["deit 1", "taught 1"]
    assert (results / "checkpoints" / "seed1" / "search" / "taught" / "last.safetensors").is_file()
    table = pd.read_csv(results / "tables" / "sweep.csv")
    assert get_profile("smoke").run("taught").label in set(table["model"]) and table["minus_deit"].notna().all()


def test_mean_and_deviation_by_hand():
    figures = pd.DataFrame(
        {"model": ["b", "a", "b"], "method": "paper", "seed": [0, 0, 1], "accuracy": [0.5, 0.25, 0.75]}
    )
    table = sweep_table(figures)
    assert table["model"].tolist() == ["b", "a"] and table["seeds"].tolist() == ["0 1", "0"]
    assert table["accuracy"].tolist() == [0.625, 0.25]
    assert table["accuracy_std"][0] == pytest.approx(0.125 * 2**0.5) and pd.isna(table["accuracy_std"][1])


def test_differences_are_of_the_same_seed():
    rows = pd.DataFrame({"model": ["b", "a"] * 2, "seed": [1, 1, 0, 0], "accuracy_macro": [0.5, 0.75, 0.25, 0.125]})
    found = with_differences(rows, {"b": "plain"})
    assert found["minus_plain"].tolist() == [0, 0.25, 0, -0.125] and found.columns[:3].tolist() == list(rows)


def test_the_sweep_in_words():
    rows = pd.DataFrame({"model": ["D", "A"] * 2, "seed": [0, 0, 1, 1], "accuracy_macro": [0.5, 0.46, 0.52, 0.5]})
    rows = rows.assign(method="paper", accuracy=0.75, mean_depth=6.0, flops_saved=0.25)
    words = summary_table(sweep_table(with_differences(rows, {"D": "deit"})), {"D": "deit"})
    assert words["minus D [points]"].tolist() == ["", "-3.00 ± 1.41"] and words["seeds"].tolist() == ["0 1"] * 2
    assert words["mean per-class accuracy [%]"].tolist() == ["51.0 ± 1.4", "48.0 ± 2.8"]
    assert words["FLOPs saved [%]"].tolist() == ["25.0 ± 0.0"] * 2
