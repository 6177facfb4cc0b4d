"""FLOPs by hand and against torch's own counter."""

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from avit_lib.evaluation import counted_flops, flops_per_image
from avit_lib.evaluation.speed import synthetic_workload


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_nano"])
def test_flops_of_a_plain_transformer_agree_with_torch(name):
    model = timm.create_model(name).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.zeros(1, 3, *model.patch_embed.img_size))
    depth = torch.full((1, model.patch_embed.num_patches + 1), len(model.blocks))
    expected = counter.get_total_flops() / 2  # torch counts a multiply-add twice
    assert flops_per_image(model, depth).item() == pytest.approx(expected, rel=5e-3)


def test_deit_tiny_needs_the_flops_of_the_paper():
    model = timm.create_model("deit_tiny_patch16_224")
    assert flops_per_image(model, torch.full((1, 197), 12)).item() == pytest.approx(1.3e9, rel=0.05)


def test_fewer_tokens_need_fewer_flops():
    model = timm.create_model("avit_nano")
    depth = torch.tensor([[4] * 17, [4] * 16 + [3], [4] * 9 + [1] * 8, [1] * 17])
    flops = flops_per_image(model, depth)
    assert (flops.diff() < 0).all()


def test_layers_after_the_class_token_halted_cost_nothing():
    model = timm.create_model("avit_nano")
    flops = flops_per_image(model, torch.tensor([[2] + [4] * 16, [2] * 17]))
    assert flops[0] == flops[1]


def test_flops_by_hand():
    model = timm.create_model("avit_nano")  # D = 16, MLP 32, 16 patches of 7 x 7, 10 classes
    linear = 16 * 48 + 16 * 16 + 2 * 16 * 32
    by_layer = [n * linear + 2 * n * n * 16 for n in (17, 5)]
    depth = torch.tensor([[2] * 5 + [1] * 12])
    assert flops_per_image(model, depth).item() == sum(by_layer) + 16 * 3 * 49 * 16 + 10 * 16


def test_counted_flops_are_those_that_the_depth_predicts():
    workload = synthetic_workload("avit_nano", batch=8, mean_depth=2.5)
    with torch.inference_mode():
        _, trace = workload.adaptive.forward_with_trace(workload.images)
    predicted = flops_per_image(workload.adaptive, trace.depth).mean().item()
    assert counted_flops(workload.adaptive, workload.images) == pytest.approx(predicted, rel=1e-6)
    assert counted_flops(workload.adaptive, workload.images) < counted_flops(
        workload.plain, workload.images
    )
