"""A-ViT as a model: the plain transformer inside it, halting as deletion, and what timm expects of
a model.
"""

import pytest
import timm
import torch
from conftest import bright_and_dark, varied_model

import avit_lib
from avit_lib.model import AViT

PAIRS = [("deit_tiny_patch16_224", "avit_tiny_patch16_224"), ("deit_nano", "avit_nano")]


def forward_deleting(model, image):
    """Algorithm 1 for one image [C, H, W], token by token; a halted token is taken out of the list.

    Returns logits [K], depth [N], ponder [N] and the output weights [L] of the class token.
    """
    embedded = torch.cat([model.cls_token, model.patch_embed(image[None])], dim=1) + model.pos_embed
    places, tokens = list(range(embedded.shape[1])), embedded
    cumulative, remainder = [0.0] * len(places), [1.0] * len(places)
    depth, ponder, weights, representation = [0] * len(places), [0.0] * len(places), [], 0.0
    for layer, block in enumerate(model.blocks, start=1):
        weights.append(torch.zeros((), dtype=tokens.dtype))
        if not places:
            continue
        tokens = block(tokens)
        kept = []
        for row, place in enumerate(places):
            token = tokens[0, row]
            score = torch.sigmoid(model.gamma * token[0] + model.beta)
            if layer == len(model.blocks):
                score = torch.ones_like(score)
            depth[place] += 1
            cumulative[place] = cumulative[place] + score
            halts = bool(cumulative[place] >= 1 - model.eps)
            weight = remainder[place] * torch.ones_like(score) if halts else score
            ponder[place] = ponder[place] + 1 + (weight if halts else 0)
            if place == 0:
                representation = representation + weight * token
                weights[-1] = weight
            if not halts:
                remainder[place] = remainder[place] - score
                kept.append(row)
        tokens, places = tokens[:, kept], [places[row] for row in kept]
    logits = model.head(model.norm(representation))
    return logits, torch.tensor(depth), torch.stack(ponder), torch.stack(weights)


@pytest.mark.parametrize("plain_name, adaptive_name", PAIRS)
def test_without_halting_it_is_the_plain_transformer(plain_name, adaptive_name):
    torch.manual_seed(0)
    plain = timm.create_model(plain_name).eval()
    model = timm.create_model(adaptive_name, beta=-1e4).eval()
    assert model.state_dict().keys() == plain.state_dict().keys() | {"gamma", "beta", "eps"}
    model.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, *plain.patch_embed.img_size)
    with torch.no_grad():
        logits, trace = model.forward_with_trace(images)
        expected = plain(images)
        assert expected.std() > 1e-3
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert (trace.depth == len(plain.blocks)).all()
    assert (
        torch.equal(trace.output_weights[:, -1], torch.ones(2))
        and (trace.output_weights[:, :-1] == 0).all()
    )


@pytest.mark.parametrize(
    "class_channel", [-1.0, 0.5, 20.0]
)  # the class token goes deep, half way, one layer
@pytest.mark.parametrize("execution", ["masked", "packed"])
def test_halted_tokens_might_as_well_be_deleted(class_channel, execution):
    model, images = varied_model(class_channel), bright_and_dark()
    model.execution = execution
    logits, trace = model.forward_with_trace(images)
    assert len(trace.depth[:2].unique()) >= 5
    assert (trace.depth[2, 1:] == 1).all() and (trace.depth[3, 1:] == 6).all()
    for image, *found in zip(
        images, logits, trace.depth, trace.ponder, trace.output_weights, strict=True
    ):
        for value, expected in zip(found, forward_deleting(model, image), strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("class_channel", [-1.0, 20.0])
@pytest.mark.parametrize("execution", ["masked", "packed"])
def test_gradients_equal_those_of_deletion(class_channel, execution):
    model, images = varied_model(class_channel), bright_and_dark()
    model.execution = execution
    direction = torch.randn(
        model.num_classes, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )

    def gradients(pairs):
        model.zero_grad()
        sum((logits @ direction).sum() + 0.1 * ponder.sum() for logits, ponder in pairs).backward()
        parameters = model.named_parameters()
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in parameters
        }

    logits, trace = model.forward_with_trace(images)
    found = gradients([(logits, trace.ponder)])
    expected = gradients(
        [(parts[0], parts[2]) for parts in (forward_deleting(model, image) for image in images)]
    )
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-10)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())


def test_halting_changes_the_result_and_the_scores_end_with_it():
    model, images = varied_model(-1.0, beta=-1e4), bright_and_dark()[:1]
    plain = model(images)
    model.beta = -1.0
    _, trace = model.forward_with_trace(images)
    assert (model(images) - plain).abs().max() > 1e-3  # halting does change the result
    scores = trace.halting_scores[0]  # [L, N]
    layer = torch.arange(1, 7)[:, None]
    assert torch.equal(scores > 0, layer <= trace.depth[0])


@pytest.mark.parametrize("execution", ["masked", "packed"])
def test_an_image_does_not_depend_on_its_neighbours(execution):
    model, images = varied_model(0.5), bright_and_dark()
    model.execution = execution
    with torch.no_grad():
        logits, trace = model.forward_with_trace(images)
        for index in range(len(images)):
            alone, own = model.forward_with_trace(images[index : index + 1])
            torch.testing.assert_close(alone[0], logits[index], rtol=0, atol=1e-10)
            torch.testing.assert_close(own.ponder[0], trace.ponder[index], rtol=0, atol=1e-10)
            assert torch.equal(own.depth[0], trace.depth[index])


def test_trace_shapes():
    model, images = varied_model(), bright_and_dark()
    logits, trace = model.forward_with_trace(images)
    assert logits.shape == (4, 10)
    assert trace.depth.shape == trace.ponder.shape == (4, 17)
    assert trace.halting_scores.shape == (4, 6, 17)
    assert trace.output_weights.shape == (4, 6)
    assert not trace.depth.is_floating_point()
    torch.testing.assert_close(trace.output_weights.sum(1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(
    "fused", [True, False]
)  # attention over nothing is NaN in the one, 0 in the other
def test_everything_halts_in_layer_one(fused):
    model, images = varied_model(0.0, beta=1e4), bright_and_dark()
    model.execution = "masked"
    for block in model.blocks:
        block.attn.fused_attn = fused
    logits, trace = model.forward_with_trace(images)
    assert (trace.depth == 1).all() and (trace.ponder == 2).all()
    logits.sum().backward()
    assert logits.isfinite().all() and model.cls_token.grad.isfinite().all()


def test_timm_finds_and_configures_it():
    assert {"avit_tiny_patch16_224", "avit_small_patch16_224", "avit_base_patch16_224"} <= set(
        timm.list_models("avit_*")
    )
    model = timm.create_model(
        "avit_nano", num_classes=7, gamma=3.0, beta=-2.0, eps=0.25, img_size=14
    )
    assert isinstance(model, AViT) and avit_lib.AViT is AViT
    assert (model.gamma, model.beta, model.eps) == (3.0, -2.0, 0.25)
    assert model(torch.zeros(2, 3, 14, 14)).shape == (2, 7)
    assert timm.create_model("avit_tiny_patch16_224").default_cfg["input_size"] == (3, 224, 224)


def test_another_head_keeps_the_backbone():
    model, images = varied_model(0.5), bright_and_dark()
    features = model.forward_features(images)
    model.reset_classifier(3)
    model.double()
    assert model.num_classes == 3 and model(images).shape == (4, 3)
    assert torch.equal(model.forward_features(images), features)
    torch.testing.assert_close(model.forward_head(features), model(images))
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), features[:, 0])


def test_a_wrong_image_size_is_named():
    with pytest.raises(AssertionError, match=r"height \(32\).*28"):
        timm.create_model("avit_nano")(torch.zeros(1, 3, 32, 32))


def test_a_learned_projection_starts_as_channel_zero_and_learns():
    plain = varied_model().double().eval()
    projected = timm.create_model(
        "avit_nano", projection=True, gamma=2.0, beta=-1.0, depth=6
    ).double()
    projected.load_state_dict(plain.state_dict())
    images = bright_and_dark()
    logits, trace = projected.forward_with_trace(images)
    torch.testing.assert_close(logits, plain(images))
    trace.ponder.mean().backward()
    assert (projected.direction.grad[1:] != 0).any()
    added = sum(p.numel() for p in projected.parameters()) - sum(
        p.numel() for p in plain.parameters()
    )
    assert added == projected.embed_dim
