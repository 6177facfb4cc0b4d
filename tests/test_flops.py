"""FLOPs against torch's own counter; those of halting tokens: ``evaluation/test_metrics.py``."""

import pytest
import timm
import torch
from torch import nn

from avit_lib.adaptive import without_thresholds
from avit_lib.flops import counted_flops, flops_of, linear_flops, plain_flops, trace_model
from avit_lib.peers import make_peers, tome


def test_of_a_plain_transformer():
    model = timm.create_model("deit_tiny_patch16_224").eval()
    images = torch.randn(2, 3, 224, 224)
    logits, trace = trace_model(model, images)
    assert torch.equal(logits, model(images))
    assert (trace.depth == 12).all() and trace.depth.shape == (2, 197)
    assert not len(trace.halting_scores)
    assert flops_of(model, trace).tolist() == 2 * [plain_flops(model, 197)]
    assert plain_flops(model, 197) == pytest.approx(1.3e9, rel=0.05)  # the paper
    assert counted_flops(model, images) == pytest.approx(plain_flops(model, 197), rel=5e-3)


def test_of_a_second_head():
    settings = {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 28, "patch_size": 14}
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, **settings)
    counted = counted_flops(model, torch.zeros(2, 3, 28, 28))
    assert plain_flops(model, 6) == pytest.approx(counted)


def test_of_images_of_another_size_than_the_model_s():
    plain = timm.create_model("deit_nano", dynamic_img_size=True)
    halting = timm.create_model("avit_nano", dynamic_img_size=True, beta=-1e4)
    images = torch.randn(2, 3, 56, 42)
    for model in (plain, halting, tome.merge_tokens(plain, 2), without_thresholds(plain)):
        trace = trace_model(model.eval(), images)[1]
        assert trace.depth.shape == (2, 49)
        assert flops_of(model, trace)[0] == pytest.approx(counted_flops(model, images), rel=1e-6)


def test_of_linear_layers_of_somebody_else_s():
    """As quantised ones."""
    foreign = nn.Identity()
    foreign.in_features, foreign.out_features = 3, 5
    adapted = nn.Linear(4, 4)  # as by LoRA, with further layers inside
    adapted.down, adapted.up = nn.Linear(4, 1), nn.Linear(1, 4)
    assert linear_flops(nn.Sequential(foreign, nn.Linear(2, 3), adapted)) == 15 + 6 + 24


@pytest.mark.parametrize("peer", [{"ToMe": [100]}, {"EViT": [0.6]}, {"MCTF": [5]}])
def test_of_peers(peer):
    [model] = make_peers(timm.create_model("deit_nano"), peer).values()
    images = torch.randn(2, 3, 28, 28)
    predicted = flops_of(model, trace_model(model, images)[1]).tolist()
    assert predicted == 2 * [pytest.approx(counted_flops(model, images), rel=1e-6)]
