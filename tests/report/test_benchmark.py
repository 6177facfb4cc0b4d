"""The scripts that time all methods side by side, and what they leave."""

import importlib
import multiprocessing.dummy
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT, assert_on_the_page

from avit_lib import packed

sys.path.append(str(ROOT / "scripts"))
benchmark = importlib.import_module("benchmark")
gpu_benchmark = importlib.import_module("gpu_benchmark")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A small size, timed in one round; the folder of the tables."""
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    monkeypatch.setattr(benchmark, "SAVED", 0.1)  # four layers cannot save much more
    monkeypatch.setattr(benchmark, "TRAINING_ROUNDS", 1)
    monkeypatch.setattr(benchmark, "PROFILED", 1)
    sizes = [benchmark.Size("nano", "nano", 28, {1: 1, 4: 1}, photographs=16)]
    for script in (benchmark, gpu_benchmark):
        monkeypatch.setattr(script, "SIZES", sizes)
    return tmp_path / "benchmark" / "tables"


@pytest.mark.usefixtures("short_timings")
def test_it_leaves_tables_and_figures(small, monkeypatch):
    # In this process: new ones know no small model.
    monkeypatch.setattr(benchmark.multiprocessing, "get_context", lambda _: multiprocessing.dummy)
    drawn = []
    save = benchmark.Results.figure
    monkeypatch.setattr(
        benchmark.Results, "figure", lambda *given: drawn.append(given[1]) or save(*given)
    )
    benchmark.main(["--device", "cpu"])
    tables = {path.stem.removesuffix("_cpu"): pd.read_csv(path) for path in small.glob("*.csv")}
    names = {"speed", "training", "memory", "overhead", "operators", "account", "cost"}
    assert set(tables) == names | {"summary"}
    [figure] = drawn
    assert_on_the_page(figure)
    ratio = tables["speed"].groupby("model")["flops_ratio"].min()
    assert ratio["A-ViT packed"] == ratio["A-ViT padded"] > 1
    assert ratio["DeiT"] == ratio["A-ViT masked"] == 1
    # Of several images one after another, the mean.
    operators = tables["operators"].pivot(index="model", columns="batch", values="operators")
    assert operators.loc["DeiT", 1] == operators.loc["DeiT", 4]
    assert operators.loc["Adaptive merging", 4] > operators.loc["DeiT", 4]
    assert set(tables["memory"]["model"]) == {*benchmark.TRAINED, "Adaptive merging"}


@pytest.mark.usefixtures("short_timings")
def test_on_a_gpu_it_compares_results_and_speeds_in_half_precision(small, capsys):
    gpu_benchmark.main(["--device", "cpu"])
    exactness = pd.read_csv(small / "gpu_exactness.csv")
    assert exactness["max_difference"].between(0, 0.2).all()
    speeds = pd.read_csv(small / "gpu_speed.csv")
    assert {"A-ViT varlen", "Adaptive merging, padded"} < set(speeds["model"])
    assert "| A-ViT varlen" in capsys.readouterr().out


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"\Aerror: [^\n]*no CUDA GPU[^\n]*\Z"):
        gpu_benchmark.main([])


@pytest.mark.parametrize("biased", [False, True])
def test_padded_attention_is_that_of_each_image_alone(biased):
    torch.manual_seed(0)
    keep = torch.tensor([True] * 5 + [True, True, False, True, False])
    layout, _ = packed.split_off(packed.whole_layout(2, 5, keep.device), keep)
    qkv = torch.randn(len(layout.index), 3, 2, 4)
    bias = torch.randn(len(qkv)) if biased else None
    found = benchmark.attend_padded(qkv, layout, 0.0, bias)
    torch.testing.assert_close(found, packed.attend(qkv, layout, 0.0, bias))
