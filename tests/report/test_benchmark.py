"""The scripts that time all methods side by side, and what they leave."""

import importlib.util
import multiprocessing.dummy
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import assert_on_the_page

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark():
    """The script for all machines."""
    return load("benchmark")


@pytest.fixture
def small(benchmark, tmp_path, monkeypatch):
    """A small size, timed in one round; the folder of the tables."""
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    monkeypatch.setattr(benchmark, "SAVED", 0.1)  # four layers cannot save much more
    monkeypatch.setattr(benchmark, "TRAINING_ROUNDS", 1)
    monkeypatch.setattr(benchmark, "PROFILED", 1)
    sizes = [benchmark.Size("nano", "nano", 28, {1: 1, 4: 1}, photographs=16)]
    monkeypatch.setattr(benchmark, "SIZES", sizes)
    return tmp_path / "benchmark" / "tables"


@pytest.mark.usefixtures("short_timings")
def test_it_leaves_tables_and_figures(benchmark, small, monkeypatch):
    # In this process: new ones know no small model.
    monkeypatch.setattr(benchmark.multiprocessing, "get_context", lambda _: multiprocessing.dummy)
    drawn = []
    save = benchmark.Results.figure
    monkeypatch.setattr(
        benchmark.Results, "figure", lambda *given: drawn.append(given[1]) or save(*given)
    )
    benchmark.main(["--device", "cpu"])
    names = ["speed", "operators", "account", "overhead", "layers", "training", "cost", "memory"]
    names.append("summary")
    assert {path.stem for path in small.glob("*.csv")} == {f"{name}_cpu" for name in names}
    assert len(drawn) == 2
    for figure in drawn:
        assert_on_the_page(figure)
    tables = {name: pd.read_csv(small / f"{name}_cpu.csv") for name in names}
    ratio = tables["speed"].groupby("model")["flops_ratio"].min()
    assert ratio["A-ViT packed"] == ratio["A-ViT padded"] > 1
    assert ratio["DeiT"] == ratio["A-ViT masked"] == 1
    # Of several images one after another, the mean.
    operators = tables["operators"].pivot(index="model", columns="batch", values="operators")
    assert operators.loc["DeiT", 1] == operators.loc["DeiT", 4]
    assert operators.loc["Adaptive merging", 4] > operators.loc["DeiT", 4]
    assert set(tables["memory"]["model"]) == {*benchmark.TRAINED, "Adaptive merging"}
