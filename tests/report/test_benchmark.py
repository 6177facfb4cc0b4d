"""The script that measures DeiT, masked and packed A-ViT, and what it leaves."""

import importlib.util
import multiprocessing.dummy
import sys
from pathlib import Path

import pandas as pd
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
SMALL = "--model avit_nano --batch 1 4 --repeats 1 --depth 2 --precision float32 --device cpu"


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = sys.modules["benchmark"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("short_timings")
def test_it_leaves_tables_and_figures(benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    # In this process: new ones know no small model.
    monkeypatch.setattr(benchmark.multiprocessing, "get_context", lambda _: multiprocessing.dummy)
    assert benchmark.main(SMALL.split()) == 0
    found = {path.stem for path in (tmp_path / "benchmark").glob("*/*.*")}
    names = ("speed", "overhead", "depth_sweep", "layers", "memory", "summary", "cost")
    assert found >= {f"{name}_cpu" for name in (*names, "throughput", "speedup", "layers")}
    table = pd.read_csv(tmp_path / "benchmark" / "tables" / "speed_cpu.csv")
    ratio = table.groupby("model")["flops_ratio"].min()
    assert ratio["A-ViT packed"] > ratio["DeiT"] == ratio["A-ViT masked"] == 1
