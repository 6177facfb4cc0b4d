"""Packed execution equals masked execution: logits, trace and gradients, in every odd case."""

import pytest
import torch
from conftest import bright_and_dark, noise, varied_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from avit_lib.packed import fold_bias, packed_block, run_packed, whole_layout


def run(model, images, execution):
    """Logits, trace and all gradients of a loss in which every output takes part."""
    model.execution = execution
    logits, trace = model.forward_with_trace(images)
    loss = logits.square().sum() + trace.ponder.mean() + trace.halting_scores.square().sum()
    loss = loss + trace.output_weights.square().sum()
    # Layers that no token reached have no gradient when packed, and one of zero when masked.
    gradients = torch.autograd.grad(loss, model.parameters(), materialize_grads=True)
    return logits, vars(trace), gradients


def assert_same(model, images):
    masked, packed = run(model, images, "masked"), run(model, images, "packed")
    assert_close(packed, masked, rtol=1e-10, atol=1e-10)
    assert_close(model(images), masked[0])


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 4),
    gamma=st.floats(1, 10),
    # With the greatest all tokens halt in the first layer, with the least in the last.
    beta=st.one_of(st.floats(-8, 3), st.sampled_from([-1e6, 1e6])),
    eps=st.floats(0.001, 0.5),
    seed=st.integers(0, 1000),
    strength=st.sampled_from([0.0, 2.0]),
    class_channel=st.sampled_from([0.0, -1e4, 1e4]),  # the class token halts last, or first
    image=st.sampled_from([0.0, -1e4, 1e4]),  # so do all patches of one image
)
def test_random_models_and_thresholds(
    batch, gamma, beta, eps, seed, strength, class_channel, image
):
    model = varied_model(class_channel, seed, gamma=gamma, beta=beta, eps=eps)
    model.train()
    model.task_gradient = strength
    images = bright_and_dark(seed)[:batch]
    images[-1] += image
    assert_same(model, images)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 2e-3)])
def test_a_bias_folded_into_queries_and_keys_acts_as_one_that_is_added(dtype, error):
    qkv = noise(20, 3, 2, 16).to(dtype)
    bias = torch.arange(1, 21).log()
    query, key, _ = qkv.double().unbind(1)
    expected = torch.einsum("qhd,khd->hqk", query, key) + bias
    query, key, value = fold_bias(qkv, bias).double().unbind(1)
    assert_close(torch.einsum("qhd,khd->hqk", query, key), expected, atol=error, rtol=0)
    assert torch.equal(value[..., :16], qkv[:, 2].double()) and not value[..., 16:].any()


def test_packed_in_evaluation_masked_in_training(monkeypatch):
    model, images = varied_model(), bright_and_dark()
    monkeypatch.setattr("avit_lib.model.run_packed", None)
    model.train()(images)
    with pytest.raises(TypeError):
        model.eval()(images)


class Operators(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.names.add("nonzero" if masks else name)  # is what a mask comes to
        return function(*args, **(kwargs or {}))


WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2"}


@pytest.mark.parametrize("every_token", [True, False])
def test_a_layer_waits_for_a_gpu_only_to_read_the_lengths(every_token, monkeypatch):
    """No operator whose result the host must know, but the one that reads how many are left."""
    model = varied_model()
    tokens, reads, read = model.embed(bright_and_dark()), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(len(self)) or read(self))
    with torch.inference_mode(), Operators() as seen:
        run_packed(model.blocks, tokens, model.rule, every_token)
    assert 3 <= len(reads) <= 5  # none after the last layer
    assert not seen.names & WAITING


def test_stochastic_depth_drops_whole_images():
    """After a block, the tokens of an image have all moved or all stayed, whatever else drops."""
    model = varied_model(drop_path_rate=0.5, attn_drop_rate=0.5, proj_drop_rate=0.1).train()
    tokens = model.embed(bright_and_dark().repeat(8, 1, 1, 1))
    after = packed_block(
        model.blocks[-1], tokens.flatten(0, 1), whole_layout(32, 17, tokens.device)
    )
    moved = (after.view_as(tokens) != tokens).any(dim=2).sum(dim=1)
    assert set(moved.tolist()) == {0, 17}
