"""Packed execution equals masked execution: logits, trace and gradients, in every odd case."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import avit_lib  # noqa: F401  registers the models
from avit_lib.errors import UserError
from avit_lib.halting import HaltingRule
from avit_lib.model import run_masked
from avit_lib.packed import attend_buckets, attend_padded, packed_layers, predict_packed, run_packed

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}


def make_model(gamma=5.0, beta=-2.0, eps=0.01, spread=1.0, seed=0, **kwargs):
    """A small A-ViT whose tokens halt at many different depths."""
    torch.manual_seed(seed)
    model = (
        timm.create_model("avit_nano", depth=6, gamma=gamma, beta=beta, eps=eps, **kwargs)
        .double()
        .eval()
    )
    with torch.no_grad():
        model.pos_embed[..., 0].normal_(std=spread)
        if model.direction is not None:
            model.direction.normal_(std=0.5)
        for block in model.blocks:
            block.attn.proj.weight.normal_(std=0.3)
            block.mlp.fc2.weight.normal_(std=0.3)
    return model


def make_images(batch, seed=0, dtype=torch.float64):
    return torch.randn(
        batch, 3, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    ).to(dtype)


def run(model, images, execution):
    """Logits, trace and all gradients of a loss in which every output takes part."""
    model = copy.deepcopy(model)
    model.execution = execution
    logits, trace = model.forward_with_trace(images)
    loss = logits.square().sum() + trace.ponder.mean() + trace.halting_scores.square().sum()
    (loss + trace.output_weights.square().sum()).backward()
    # Layers that no token reached have no gradient when packed, and one of zero when masked.
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return logits, trace, gradients


def assert_same(model, images, tolerance=1e-10):
    masked, packed = run(model, images, "masked"), run(model, images, "packed")
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(packed[0], masked[0], **close)
    assert torch.equal(packed[1].depth, masked[1].depth)
    for name in ("ponder", "halting_scores", "output_weights"):
        torch.testing.assert_close(getattr(packed[1], name), getattr(masked[1], name), **close)
    for ours, theirs in zip(packed[2], masked[2], strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    with torch.inference_mode():
        model.execution = "packed"
        torch.testing.assert_close(model(images), masked[0].detach(), **close)
    return masked[1].depth


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 5),
    gamma=st.floats(1, 10),
    beta=st.floats(-8, 3),
    eps=st.floats(0.001, 0.5),
    seed=st.integers(0, 1000),
)
def test_random_models_and_thresholds(batch, gamma, beta, eps, seed):
    assert_same(make_model(gamma, beta, eps, seed=seed), make_images(batch, seed))


def test_depths_differ_within_and_between_images():
    depth = assert_same(make_model(), make_images(8))
    assert depth.unique().numel() >= 4
    assert depth.double().mean(dim=1).unique().numel() >= 4


def test_batch_of_one():
    assert_same(make_model(), make_images(1))


def test_everything_halts_in_the_first_layer():
    assert (assert_same(make_model(beta=1e4), make_images(3)) == 1).all()


def test_nothing_halts():
    assert (assert_same(make_model(beta=-1e4), make_images(3)) == 6).all()


def test_every_patch_halts_in_the_first_layer_and_the_class_token_goes_on():
    model = make_model(gamma=1.0, beta=0.0)
    with torch.no_grad():
        model.pos_embed[:, 1:, 0] = 1e4
        model.pos_embed[:, :1, 0] = -1e4
    depth = assert_same(model, make_images(3))
    assert (depth[:, 1:] == 1).all() and (depth[:, 0] == 6).all()


def test_one_image_finishes_early():
    model = make_model(gamma=1.0, beta=-1e3)
    images = make_images(3)
    with torch.no_grad():
        model.patch_embed.proj.weight[0] = 1.0  # channel 0 of a patch: the sum of its pixels
        model.cls_token[..., 0] = 1e4
        images[1] = 1e3
    depth = assert_same(model, images)
    assert (depth[1] == 1).all() and (depth[0, 1:] == 6).all()


def test_a_token_exactly_on_the_boundary_halts():
    model = make_model(gamma=0.0, beta=0.0, eps=0.5)  # every score is 1/2 = 1 - eps
    assert (assert_same(model, make_images(2)) == 1).all()


def test_one_token_in_all():
    blocks = make_model().blocks
    tokens = torch.randn(1, 1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    masked, packed = (
        function(blocks, tokens, HaltingRule(5.0, -2.0, 0.01))
        for function in (run_masked, run_packed)
    )
    torch.testing.assert_close(packed[0], masked[0])
    assert torch.equal(packed[1].depth, masked[1].depth)


@pytest.mark.parametrize("attend", [attend_buckets, attend_padded])
def test_every_attention_gives_the_same(attend, monkeypatch):
    monkeypatch.setattr("avit_lib.packed.pick_attention", lambda *_: attend)
    model = make_model()
    tokens = model.embed(make_images(6))
    expected, trace = run_masked(model.blocks, tokens, model.rule)
    got, packed_trace = run_packed(model.blocks, tokens, model.rule)
    torch.testing.assert_close(got, expected)
    assert torch.equal(packed_trace.depth, trace.depth)
    torch.testing.assert_close(predict_packed(model.blocks, tokens, model.rule), expected)


def test_an_image_does_not_depend_on_the_rest_of_the_batch():
    model, images = make_model(), make_images(5)
    together, trace = model.forward_with_trace(images)
    for number in range(len(images)):
        alone, alone_trace = model.forward_with_trace(images[number : number + 1])
        torch.testing.assert_close(alone[0], together[number], rtol=1e-10, atol=1e-10)
        assert torch.equal(alone_trace.depth[0], trace.depth[number])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_within_its_tolerance(dtype):
    """Depths may differ where a sum lies within rounding of the threshold, so the scores are kept
    away from it.
    """
    model = make_model(gamma=0.0, beta=-1.0).to(
        dtype
    )  # every token scores 0.27 and halts in layer 4
    images = make_images(4, dtype=dtype)
    model.execution = "masked"
    with torch.inference_mode():
        masked, _ = model.forward_with_trace(images)
        model.execution = "packed"
        packed, trace = model.forward_with_trace(images)
    assert (trace.depth == 4).all()
    torch.testing.assert_close(packed, masked, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_packed_in_evaluation_masked_in_training(monkeypatch):
    model, images = make_model(), make_images(2)
    calls = []
    monkeypatch.setattr(
        "avit_lib.model.run_packed", lambda *a, **k: calls.append("packed") or run_packed(*a, **k)
    )
    monkeypatch.setattr(
        "avit_lib.model.run_masked", lambda *a, **k: calls.append("masked") or run_masked(*a, **k)
    )
    model.eval().forward_with_trace(images)
    model.train().forward_with_trace(images)
    assert calls == ["packed", "masked"]
    model.execution = "zipped"
    with pytest.raises(UserError, match="zipped"):
        model(images)


VARIANTS = [{"class_token_halts": False}, {"projection": True}]


class Operators(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        if function.overloadpacket.__name__ == "index" and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        ):
            self.names.add("nonzero")  # is what a mask comes to
        return function(*args, **(kwargs or {}))


WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "is_nonzero",
    "repeat_interleave",
}


@pytest.mark.parametrize(
    "variant", [{}, *VARIANTS], ids=lambda variant: "-".join(variant) or "paper"
)
@pytest.mark.parametrize("every_token", [True, False])
def test_a_layer_waits_for_a_gpu_only_to_read_the_lengths(variant, every_token, monkeypatch):
    """No operator whose result the host must know, but the one that reads how many tokens are
    left.
    """
    model = make_model(**({"beta": -4.0} | variant))
    tokens, reads, read = model.embed(make_images(6)), [], torch.Tensor.tolist
    monkeypatch.setattr("avit_lib.packed.pick_attention", lambda *_: attend_padded)  # as on a GPU
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(len(self)) or read(self))
    with torch.inference_mode(), Operators() as seen:
        layers = len(list(packed_layers(model.blocks, tokens, model.rule, every_token)))
    assert layers >= 4 and len(reads) <= layers
    assert not seen.names & WAITING
    with torch.inference_mode(), Operators() as seen:
        tokens[:, torch.rand(17) > 0.5]
    assert seen.names & WAITING  # what it would look like


def test_stochastic_depth_drops_whole_images():
    """After a block whose paths are dropped or kept by image, the tokens of an image have all moved
    or all stayed.
    """
    model = make_model(beta=-1e4, drop_path_rate=0.5).train()
    tokens = model.embed(make_images(32))
    before, after = [
        buffer
        for _, buffer, _, _ in packed_layers(model.blocks, tokens, model.rule, every_token=True)
    ][-2:]
    moved = (before != after).any(dim=1).view(32, 17)
    assert (moved.all(dim=1) | ~moved.any(dim=1)).all()
    assert 0 < moved[:, 0].sum() < 32


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(variant))
@pytest.mark.parametrize("beta", [-1e4, -2.0, 0.0, 1e4])
@pytest.mark.parametrize("batch", [1, 5])
def test_variants(variant, beta, batch):
    depth = assert_same(make_model(beta=beta, **variant), make_images(batch))
    if "class_token_halts" in variant:
        assert (depth[:, 0] == 6).all()


def test_dropout_of_attention_still_runs():
    model = make_model(attn_drop_rate=0.5, proj_drop_rate=0.1).train()
    model.execution = "packed"
    logits, _ = model.forward_with_trace(make_images(4))
    assert torch.isfinite(logits).all()
