"""Workloads and timings do what they say; how fast they are is no matter for tests."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from avit_lib.errors import UserError
from avit_lib.evaluation import counted_flops
from avit_lib.evaluation.allocator import allocator_thresholds
from avit_lib.evaluation.speed import (
    MODELS,
    benchmark,
    depth_sweep,
    interleaved,
    layer_times,
    operator_times,
    synthetic_workload,
    throughput,
    without_halting,
)
from avit_lib.halting import executed_depth

CPU = torch.device("cpu")


def test_synthetic_halting_has_the_stated_depth_and_a_spread():
    workload = synthetic_workload(
        "avit_nano", batch=64, mean_depth=2.5, image_spread=0.5, token_spread=0.5
    )
    with torch.inference_mode():
        _, trace = workload.adaptive.forward_with_trace(workload.images)
    patches = trace.depth[:, 1:].float()
    assert abs(patches.mean() - 2.5) < 0.2
    assert patches.mean(dim=1).std() > 0.2
    assert (trace.depth[:, 0] == len(workload.adaptive.blocks)).all()
    assert "mean depth" in workload.describe()


NEW_PAGES = """
import resource, torch
from avit_lib.evaluation.speed import interleaved

def new_pages(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(count)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def settled():
    return [(new_pages(count), new_pages(count))[1] for count in (2**22, 2**24)]  # 16 and 64 MiB

before, timed = settled(), []
interleaved({"a step": lambda: timed.append(new_pages(2**24))}, 3, minimum=0.0)
print(*before, timed[-1], *settled())
"""
KEPT = {"mmap_threshold": 2**30, "trim_threshold": 2**32}


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc gives large buffers back at once"
)
@pytest.mark.parametrize(
    ("environment", "are_kept"),
    [
        ({}, (True, False)),
        ({f"MALLOC_{name.upper()}_": f"{size}" for name, size in KEPT.items()}, (True, True)),
        (
            {
                "GLIBC_TUNABLES": ":".join(
                    f"glibc.malloc.{name}={size}" for name, size in KEPT.items()
                )
            },
            (True, True),
        ),
    ],
)
def test_freed_buffers_are_kept_while_something_is_timed_and_afterwards_as_before(
    environment, are_kept
):
    # In a new process: where buffers lie in an old one is chance.
    others = {name: value for name, value in os.environ.items() if "MALLOC" not in name.upper()}
    ran = subprocess.run(
        [sys.executable, "-c", NEW_PAGES],
        capture_output=True,
        text=True,
        check=True,
        env=others | environment,
    )
    *before, timed, after_16, after_64 = map(int, ran.stdout.split())
    assert timed < 1000
    assert tuple(pages < 1000 for pages in before) == are_kept
    assert tuple(pages < 1000 for pages in (after_16, after_64)) == are_kept


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("UNSET", "", (2**25, 2**26)),  # where growth ends
        (
            "MALLOC_MMAP_THRESHOLD_",
            "0x100000",
            (2**20, 2**17),
        ),  # the other one stays where growth begins
        ("MALLOC_TOP_PAD_", "0", (2**17, 2**17)),
        (
            "GLIBC_TUNABLES",
            "glibc.malloc.check=1:glibc.malloc.trim_threshold=4294967296",
            (2**17, -1),
        ),
    ],
)
def test_one_allocator_setting_ends_the_growth_of_the_others(name, value, expected, monkeypatch):
    for known in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setenv(name, value)
    assert allocator_thresholds() == expected


def test_functions_take_turns():
    order = []
    samples = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, minimum=0.0
    )
    assert [len(values) for values in samples.values()] == [3, 3]
    assert order[-6:] == ["a", "b"] * 3


@pytest.mark.parametrize("task", ["inference", "training"])
def test_the_benchmark_compares_three_models(task):
    workload = synthetic_workload("avit_nano", batch=4, mean_depth=2.0)
    before = [parameter.clone() for parameter in workload.adaptive.parameters()]
    table = benchmark(workload, task, "float32", repeats=1, device=CPU).set_index("model")
    assert tuple(table.index) == MODELS
    assert table.loc["DeiT", "speedup"] == 1 and table.loc["A-ViT packed", "flops_ratio"] > 1
    assert table.loc["A-ViT masked", "gflops_per_image"] == table.loc["DeiT", "gflops_per_image"]
    assert (table["efficiency"] == table["speedup"] / table["flops_ratio"]).all()
    assert all(
        torch.equal(old, new)
        for old, new in zip(before, workload.adaptive.parameters(), strict=True)
    )


def test_bfloat16_means_weights_and_activations_in_inference():
    workload = synthetic_workload("avit_nano", batch=4, mean_depth=2.0)
    table = benchmark(workload, "inference", "bfloat16", repeats=1, device=CPU)
    assert len(table) == 3
    assert (
        next(workload.plain.parameters()).dtype == torch.float32
    )  # the workload itself is as it was
    with pytest.raises(UserError, match="the precisions float32, bfloat16"):
        benchmark(workload, "inference", "float8", repeats=1, device=CPU)


def test_a_limit_ends_the_rounds_but_three_are_made():
    samples = interleaved({"a": lambda: None}, repeats=50, minimum=0.0, limit=0.0)
    assert len(samples["a"]) == 3


def test_without_halting_every_token_is_computed():
    workload = without_halting(synthetic_workload("avit_nano", batch=4, mean_depth=1.0))
    assert counted_flops(workload.adaptive, workload.images) == counted_flops(
        workload.plain, workload.images
    )


def test_throughput_is_relative_to_the_first_model():
    workload = synthetic_workload("avit_nano", batch=4, mean_depth=2.0)
    models = {"plain": (workload.plain, ""), "masked": (workload.adaptive, "masked")}
    table = throughput(models, workload.images, repeats=1).set_index("model")
    assert (
        table.loc["plain", "speedup"] == 1
        and (table["images_per_second"] > 0).all()
        and (table["batch"] == 4).all()
    )


def test_tokens_by_layer_are_those_of_the_trace():
    workload = synthetic_workload("avit_nano", batch=8, mean_depth=2.0)
    with torch.inference_mode():
        depth = executed_depth(workload.adaptive.forward_with_trace(workload.images)[1].depth)
    table = layer_times(workload, repeats=1)
    expected = [(depth >= layer).sum().item() / 8 for layer in table["layer"]]
    assert table["tokens"].tolist() == expected and table["ideal"][0] == pytest.approx(
        table["deit"].mean()
    )


def test_depths_are_compared_with_one_deit_in_the_same_rounds():
    table = depth_sweep("avit_nano", [1.5, 3.0], batch=4, repeats=3, device=CPU)
    assert (
        table["mean_depth"].tolist() == [1.5, 3.0] and table["flops_ratio"].is_monotonic_decreasing
    )
    assert (
        table["speedup"].between(table["speedup_low"], table["speedup_high"]).all()
        and (table["rounds"] == 3).all()
    )
    assert table["efficiency"].tolist() == pytest.approx(
        (table["speedup"] / table["flops_ratio"]).tolist()
    )


def test_operators_are_compared_with_deit_times_the_tokens_left():
    workload = synthetic_workload("avit_nano", batch=8, mean_depth=2.0)
    table, layers = (
        operator_times(workload, repeats=2).set_index("operator"),
        layer_times(workload, repeats=1),
    )
    share = layers["tokens"].mean() / layers["tokens"][0]
    assert table["ideal"].tolist() == pytest.approx((share * table["deit"]).tolist())
    assert {"addmm", "attention", "index_select"} <= {*table.index} and not [
        n for n in table.index if n != n.strip("_")
    ]
    assert table.loc["index_select", "deit"] == 0 and table.loc["index_select", "above"] > 0
    assert table["above"].between(table["above_low"], table["above_high"]).all()
