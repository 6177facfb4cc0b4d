"""The script that measures DeiT, masked and packed A-ViT, and what it leaves."""

import importlib.util
import sys
from pathlib import Path

import pandas as pd
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    module = sys.modules["benchmark"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet18"], "no A-ViT is called 'resnet18'"),
        (["--model", "avit_nano", "--depth", "5"], "between 1 and 4"),
        (["--batch", "0"], "positive"),
    ],
)
def test_what_cannot_be_measured_is_named_in_one_line(benchmark, arguments, message, capsys):
    assert benchmark.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_synthetic_halting_has_the_stated_depth_and_a_spread(benchmark):
    workload = benchmark.synthetic_workload(
        "avit_nano", 64, 2.5, image_spread=0.5, token_spread=0.5
    )
    depth = workload.adaptive.forward_with_trace(workload.images)[1].depth
    assert depth[:, 1:].double().mean() == pytest.approx(2.5, abs=0.2)
    assert depth[:, 1:].double().mean(dim=1).std() > 0.2
    assert (depth[:, 0] == 4).all()


def test_it_leaves_tables_and_figures(benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    monkeypatch.setattr(
        benchmark,
        "measure_memory",
        lambda plan: pd.DataFrame(
            {
                "task": "inference",
                "precision": "float32",
                "batch": 4,
                "model": benchmark.MODELS,
                "of_deit": 1,
            }
        ),
    )  # in processes that know no small model
    short = benchmark.interleave
    monkeypatch.setattr(benchmark, "interleave", lambda *a, **k: short(*a, **k, minimum=0.0))
    small = "--model avit_nano --batch 1 4 --repeats 1 --depth 2 --precision float32 --device cpu"
    assert benchmark.main([*small.split(), "--task", "inference"]) == 0
    folder = tmp_path / "benchmark"
    names = {"speed", "overhead", "depth_sweep", "layers", "memory", "summary"}
    assert {path.stem for path in folder.glob("tables/*.csv")} == {f"{name}_cpu" for name in names}
    drawn = {path.stem for path in folder.glob("figures/*.png")}
    assert drawn == {"throughput_cpu", "speedup_cpu", "layers_cpu"}
    table = pd.read_csv(folder / "tables" / "speed_cpu.csv").set_index(["batch", "model"])
    assert list(table.index) == [(batch, model) for batch in (1, 4) for model in benchmark.MODELS]
    assert (table.xs("A-ViT packed", level="model")["flops_ratio"] > 1).all()


def test_the_cost_of_imagenet_follows_from_the_fastest_batch(benchmark):
    speeds = {"model": ["DeiT", "DeiT", "A-ViT"], "images_per_second": [10.0, 1271.167, 2542.334]}
    speeds = pd.DataFrame({"task": "training", "precision": "float32", **speeds})
    table = benchmark.estimate_cost(speeds).set_index("model")
    hours = 1_271_167 * 100 / 1271.167 / 3600
    assert table.loc["DeiT", "hours on 1"] == pytest.approx(hours, abs=0.05)
    assert table.loc["A-ViT", "hours on 4"] == pytest.approx(hours / 8, abs=0.05)
