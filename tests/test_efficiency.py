"""The benchmark's workloads do what they say; how fast they are is no matter for tests."""

import pytest
import torch

from avit_lib.efficiency import MODELS, benchmark, counted_flops, interleaved, synthetic_workload
from avit_lib.evaluation import flops_per_image

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "mean"), [("avit_micro_patch4_28", 7.0), ("avit_nano_patch7_28", 2.5)])
def test_synthetic_halting_has_the_stated_depth_and_a_spread(name, mean):
    workload = synthetic_workload(name, batch=64, mean_depth=mean, image_spread=0.5, token_spread=0.5)
    with torch.inference_mode():
        _, trace = workload.adaptive.forward_with_trace(workload.images)
    patches = trace.depth[:, 1:].float()
    assert abs(patches.mean() - mean) < 0.2
    assert patches.mean(dim=1).std() > 0.2
    assert (trace.depth[:, 0] == len(workload.adaptive.blocks)).all()
    assert "mean depth" in workload.describe()


def test_counted_flops_are_those_that_the_depth_predicts():
    workload = synthetic_workload("avit_micro_patch4_28", batch=8, mean_depth=6.0)
    with torch.inference_mode():
        _, trace = workload.adaptive.forward_with_trace(workload.images)
    predicted = flops_per_image(workload.adaptive, trace.depth).mean().item()
    assert counted_flops(workload.adaptive, workload.images) == pytest.approx(predicted, rel=1e-6)
    assert counted_flops(workload.adaptive, workload.images) < counted_flops(workload.plain, workload.images)


def test_functions_take_turns():
    order = []
    samples = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, CPU, minimum=0.0)
    assert [len(values) for values in samples.values()] == [3, 3]
    assert order[-6:] == ["a", "b"] * 3


@pytest.mark.parametrize("task", ["inference", "training"])
def test_the_benchmark_compares_three_models(task):
    workload = synthetic_workload("avit_nano_patch7_28", batch=4, mean_depth=2.0)
    before = [parameter.clone() for parameter in workload.adaptive.parameters()]
    table = benchmark(workload, task, "float32", repeats=1, device=CPU).set_index("model")
    assert tuple(table.index) == MODELS
    assert table.loc["DeiT", "speedup"] == 1 and table.loc["A-ViT packed", "flops_ratio"] > 1
    assert table.loc["A-ViT masked", "gflops_per_image"] == table.loc["DeiT", "gflops_per_image"]
    assert (table["efficiency"] == table["speedup"] / table["flops_ratio"]).all()
    assert all(torch.equal(old, new) for old, new in zip(before, workload.adaptive.parameters(), strict=True))
