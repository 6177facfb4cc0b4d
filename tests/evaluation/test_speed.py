"""Timings do what they say, by a clock of the tests; how fast models are is no matter here."""

import os
import platform
import subprocess
import sys

import pytest
import timm
import torch
from conftest import random_images, varied_model

from avit_lib import AViT
from avit_lib.evaluation import predict, speed


@pytest.fixture
def clock(monkeypatch):
    """Makes steps that take the given seconds, the last for ever, and a list of who was called."""
    now, order = [0.0], []

    def make_step(name, *seconds):
        waits = iter(seconds)

        def step():
            order.append(name)
            now[0] += next(waits, seconds[-1])

        return step

    monkeypatch.setattr(speed, "read_clock", lambda: now[0])
    monkeypatch.setattr(speed.gc, "collect", lambda: None)  # slow, and no matter here
    return make_step, order


def test_steps_take_turns_and_a_sample_is_the_mean_of_its_calls(clock):
    make_step, order = clock
    steps = {"a": make_step("a", 9.0, 2.0), "b": make_step("b", 0.1)}
    samples = speed.interleave(steps, 8, minimum=0.5)
    # The first call warms up.
    assert samples == {"a": pytest.approx([2.0] * 8), "b": pytest.approx([0.1] * 8)}
    # Long ones run once before, short ones twice; then as many as fill the minimum.
    assert order[:3] == ["a", "b", "b"]
    rounds = {"".join(order[begin : begin + 6]) for begin in range(3, len(order), 6)}
    assert rounds == {"a" + 5 * "b", 5 * "b" + "a"}  # nobody is always the first


def test_where_only_the_first_call_is_slow_later_samples_take_more(clock):
    make_step, order = clock
    speed.interleave({"a": make_step("a", 9.0, 0.1)}, 2, minimum=0.5)
    assert len(order) == 1 + 1 + 5


def test_speed_is_the_median_with_quartiles_and_compared_with_the_first(clock):
    first, second = clock[0]("a", 4.0, 4.0), clock[0]("b", 1.0, 1.0, 2.0, 4.0, 5.0)
    table = speed.compare({"a": first, "b": second}, batch=8, repeats=5)
    assert table["images_per_second"].tolist() == [2, 2]
    found = table.loc[1, "images_per_second_low":"speedup"].tolist()
    assert found == pytest.approx([8 / 5, 8 / 2, 1.0])  # of 1, 2, 4, 5, 5 seconds


def test_a_step_runs_as_told_and_leaves_the_model_as_it_was(monkeypatch):
    seen, images = [], random_images(2)[:][0]
    monkeypatch.setattr(AViT, "forward", lambda model, _: seen.append(model.execution))
    model = timm.create_model("avit_nano", execution="auto")
    for execution in ("masked", "packed"):
        speed.infer(model, images, execution)()
    assert seen == ["masked", "packed"] and model.execution == "auto"


@pytest.mark.usefixtures("short_timings")
def test_a_model_stands_beside_its_plain_twin_at_each_batch_size():
    data, model = random_images(8), varied_model().float()
    images = torch.stack([image for image, _ in data])
    plain = timm.create_model("deit_nano", depth=6)
    table = speed.benchmark_model(model, plain, images)
    assert table["batch"].tolist() == [1, 1, 8, 8]  # there are no 64 images
    full, left = (predict(one, data).flops.sum().item() for one in (plain, model))
    assert table["flops_saved"].tolist()[2:] == [0, pytest.approx(1 - left / full)]


NEW_PAGES = """
import resource, torch
from avit_lib.evaluation.speed import interleave

def new_pages(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(count)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def settled():
    return [(new_pages(count), new_pages(count))[1] for count in (2**22, 2**24)]  # 16 and 64 MiB

before, timed = settled(), []
interleave({"a step": lambda: timed.append(new_pages(2**24))}, 3, minimum=0.0)
print(*before, timed[-1], *settled())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="others keep buffers as they like")
def test_freed_buffers_are_kept_while_something_is_timed_and_afterwards_as_before():
    # In a new process: where buffers lie in an old one is chance. A huge page has 2 MiB: 20 new
    # tensors of 64 MiB are 640 huge pages, or 300 thousand small ones.
    set_by_hand = ("MALLOC_", "GLIBC_TUNABLES")
    others = {name: value for name, value in os.environ.items() if not name.startswith(set_by_hand)}
    found = subprocess.check_output([sys.executable, "-c", NEW_PAGES], env=others)
    few = [int(pages) < 100 for pages in found.split()]
    assert few == [True, False, True, True, False]
