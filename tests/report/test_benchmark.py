"""The command that measures everything, and what it leaves."""

import pandas as pd
import pytest

from avit_lib import cli
from avit_lib.evaluation import speed
from avit_lib.study import benchmark
from avit_lib.study.benchmark import cost_table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet18"], "no A-ViT is called 'resnet18'"),
        (["--depth", "13"], "between 1 and 12"),
        (["--model", "avit_nano", "--depth", "5"], "between 1 and 4"),
        (["--batch", "0"], "positive"),
        (["--repeats", "0"], "positive"),
        (["--limit", "-1"], "positive"),
        (["--task", "sleeping"], 'Invalid value "sleeping" for --task'),
    ],
)
def test_the_command_names_what_it_cannot_measure(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    assert cli.main(["benchmark", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_command_leaves_tables_figures_and_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AVIT_RESULTS", str(tmp_path))
    monkeypatch.setattr(
        benchmark, "peak_memory", lambda *_: 1.0
    )  # in processes that know no small model
    seeds, workload = set(), speed.synthetic_workload
    monkeypatch.setattr(
        speed, "synthetic_workload", lambda *a, seed=0: seeds.add(seed) or workload(*a, seed=seed)
    )
    small = [
        "--model",
        "avit_nano",
        "--batch",
        "1",
        "4",
        "--repeats",
        "1",
        "--depth",
        "2",
        "--seed",
        "3",
    ]
    assert (
        cli.main(
            [
                "benchmark",
                *small,
                "--precision",
                "float32",
                "--task",
                "inference",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    folder = tmp_path / "benchmark"
    page = (folder / "README.md").read_text()
    tables = {
        "speed_cpu",
        "overhead_cpu",
        "depth_sweep_cpu",
        "layers_cpu",
        "memory_cpu",
        "summary_cpu",
    }
    pictures = {"throughput_cpu", "speedup_cpu", "layers_cpu"}
    assert {
        path.stem for path in (folder / "tables").glob("*.csv")
    } == tables  # without training none of its cost
    assert {path.stem for path in (folder / "figures").glob("*.png")} == pictures
    assert all(f"### {name.replace('_', ' ')}\n" in page for name in tables | pictures)
    table = pd.read_csv(folder / "tables" / "speed_cpu.csv")
    assert table["model"].tolist() == ["DeiT", "A-ViT masked", "A-ViT packed"] * 2
    assert table["batch"].tolist() == [1] * 3 + [4] * 3 and set(table["rounds"]) == {1}
    assert (table.loc[table["model"] == "A-ViT packed", "flops_ratio"] > 1).all() and seeds == {3}
    shown = capsys.readouterr().out
    assert "| A-ViT packed |" in shown and f"tables and figures: {folder / 'README.md'}" in shown
    assert "synthetic halting" in page


def test_the_cost_of_imagenet_follows_from_the_fastest_batch():
    speeds = pd.DataFrame(
        {
            "task": ["training", "training", "training", "inference"],
            "precision": "float32",
            "batch": [8, 64, 64, 256],
            "model": ["DeiT", "DeiT", "A-ViT packed", "DeiT"],
            "images_per_second": [10.0, 1271.167, 2542.334, 1e9],
        }
    )
    table = cost_table(speeds).set_index("model")
    hours = 1_271_167 * 100 / 1271.167 / 3600
    assert table.loc["DeiT", "hours on 1"] == pytest.approx(hours, abs=0.05)
    assert table.loc["A-ViT packed", "hours on 4"] == pytest.approx(hours / 8, abs=0.05)
