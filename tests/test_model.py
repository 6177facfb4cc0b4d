"""A-ViT as a model: the plain transformer inside it, halting as deletion, what timm expects."""

import math

import pytest
import timm
import torch
from conftest import bright_and_dark, refused, varied_model
from torch.testing import assert_close

from avit_lib.model import AViT


def forward_deleting(model, image):
    """Algorithm 1 for one image [C, H, W], token by token; a halted token is taken out of the list.

    Returns logits [K], depth [N], ponder [N] and the output weights [L] of the class token.
    """
    tokens = model.embed(image[None])
    places = list(range(tokens.shape[1]))
    sums, depth, ponder = [0.0] * len(places), [0] * len(places), [0.0] * len(places)
    weights, representation = torch.zeros(len(model.blocks)).double(), 0.0
    for layer, block in enumerate(model.blocks, start=1):
        tokens = block(tokens)
        kept = []
        for row, place in enumerate(places):
            token = tokens[0, row]
            score = torch.sigmoid(model.gamma * token[0] + model.beta)
            if layer == len(model.blocks):
                score = torch.ones_like(score)
            weight, sums[place] = score, sums[place] + score
            if sums[place] >= 1 - model.eps:
                weight = 1 - (sums[place] - score)  # the remainder
                depth[place], ponder[place] = layer, layer + weight
            else:
                kept.append(row)
            if place == 0:
                representation = representation + weight * token
                weights[layer - 1] = weight
        tokens, places = tokens[:, kept], [places[row] for row in kept]
    logits = model.head(model.norm(representation))
    return logits, torch.tensor(depth), torch.stack(ponder), weights


def test_without_halting_it_is_the_plain_transformer():
    torch.manual_seed(0)
    plain = timm.create_model("deit_tiny_patch16_224").eval()
    model = timm.create_model("avit_tiny_patch16_224", beta=-1e4).eval()
    assert model.state_dict().keys() == plain.state_dict().keys() | {"gamma", "beta", "eps"}
    model.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 224, 224)
    logits, trace = model.forward_with_trace(images)
    for found in (logits, model(images)):
        assert_close(found, plain(images))
    assert (trace.depth == 12).all()
    assert torch.equal(trace.output_weights, torch.eye(12)[-1].expand(2, -1))


# The class token goes deep, half way, one layer.
@pytest.mark.parametrize("class_channel", [-1.0, 0.5, 20.0])
@pytest.mark.parametrize("execution", ["masked", "packed"])
def test_halted_tokens_might_as_well_be_deleted(class_channel, execution):
    model, images = varied_model(class_channel, execution=execution), bright_and_dark()

    def gradients(logits, ponder):
        loss = logits.square().sum() + 0.1 * ponder.sum()
        return torch.autograd.grad(loss, model.parameters(), materialize_grads=True)

    logits, trace = model.forward_with_trace(images)
    assert len(trace.depth[:2].unique()) >= 5
    assert (trace.depth[2, 1:] == 1).all() and (trace.depth[3, 1:] == 6).all()
    deleting = zip(*(forward_deleting(model, image) for image in images), strict=True)
    expected = [torch.stack(values) for values in deleting]
    found = [logits, trace.depth, trace.ponder, trace.output_weights]
    assert_close(found, expected, rtol=0, atol=1e-10)
    assert_close(model(images), logits)
    layer = torch.arange(1, 7)[:, None]
    assert torch.equal(trace.halting_scores > 0, layer <= trace.depth[:, None])
    found, expected = gradients(logits, trace.ponder), gradients(expected[0], expected[2])
    assert_close(found, expected)
    model.beta = -1e4
    assert (model(images) - logits).abs().max() > 1e-4  # halting does change the result


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("eps", 0.0, "eps must lie between 0 and 1"),
        ("eps", 1.5, "eps must lie between 0 and 1"),
        ("beta", math.nan, "beta must be a finite number"),
        ("execution", "pcked", "execution 'pcked' is unknown; choose from auto, masked, packed"),
    ],
)
def test_a_setting_by_which_nothing_can_halt_is_refused(name, value, reason):
    with refused(reason):
        timm.create_model("avit_nano", **{name: value})
    with refused(reason):
        setattr(timm.create_model("avit_nano"), name, value)


def test_timm_finds_and_configures_it():
    for size, width in (("tiny", 192), ("small", 384), ("base", 768)):
        model = timm.create_model(f"avit_{size}_patch16_224", depth=1, gamma=3.0, eps=0.25)
        assert isinstance(model, AViT) and model.embed_dim == width
        assert (model.gamma, model.beta, model.eps) == (3.0, -10.0, 0.25)


def test_it_is_made_without_memory_for_its_weights():
    with torch.device("meta"):
        model = timm.create_model("avit_nano", beta=-3.0)
    assert model.pos_embed.is_meta and model.to_empty(device="cpu").beta == -3
