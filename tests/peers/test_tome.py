"""Token merging against a loop over single images: what merges, what stands for it, how deep."""

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import small_model

from avit_lib.adaptive import without_thresholds
from avit_lib.errors import UserError
from avit_lib.flops import trace_model
from avit_lib.peers import tome


def trained_looking(**kwargs):
    """A float64 model whose tokens differ more than those of a freshly initialised one."""
    torch.manual_seed(0)
    model = small_model("deit", **kwargs).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def images(count=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 28, 28, generator=generator, dtype=torch.float64)


def one_image(model, image, r):
    """Logits [K] and depth [N] of one image: lists of members, duplicates instead of sizes."""
    tokens = model._pos_embed(model.patch_embed(image[None]))[0]
    groups = [[place] for place in range(len(tokens))]
    depth = [len(model.blocks)] * len(tokens)
    for layer, block in enumerate(model.blocks, start=1):
        # A token is attended as often as tokens are in it.
        repeat = [place for place, group in enumerate(groups) for _ in group]
        qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, block.attn.num_heads, -1))
        q, k, v = qkv.unbind(1)
        logits = torch.einsum("qhd,khd->hqk", q, k[repeat]) / q.shape[-1] ** 0.5
        taken = torch.einsum("hqk,khd->qhd", logits.softmax(dim=-1), v[repeat]).flatten(1)
        tokens = tokens + block.attn.proj(taken)
        keys = F.normalize(k.mean(dim=1), dim=-1)
        likeness = {}
        for asks in range(2, len(tokens), 2):
            likeness[asks] = max(
                (keys[asks].dot(keys[asked]).item(), asked) for asked in range(1, len(tokens), 2)
            )
        chosen = sorted(likeness, key=likeness.get, reverse=True)[:r]
        kept = [place for place in range(0, len(tokens), 2) if place not in chosen]
        kept += range(1, len(tokens), 2)
        means, joined = [], []
        for place in kept:
            members = [place, *(one for one in chosen if likeness[one][1] == place)]
            size = torch.tensor([float(len(groups[one])) for one in members]).double()
            means.append(size @ tokens[members] / size.sum())
            joined.append([first for one in members for first in groups[one]])
        for one in chosen:
            depth[groups[one][0]] = layer  # the first of a group is the token that it still is
        tokens, groups = torch.stack(means), joined
        tokens = tokens + block.mlp(block.norm2(tokens))
    return model.forward_head(model.norm(tokens[None]))[0], torch.tensor(depth)


@pytest.mark.parametrize("r", [1, 3, 5, 100])
def test_it_does_what_a_loop_over_single_images_does(r):
    model = trained_looking()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits, trace = trace_model(tome.TokenMerging(model, r), images())
    for number, image in enumerate(images()):
        expected, depth = one_image(model, image, r)
        torch.testing.assert_close(logits[number], expected, rtol=0, atol=1e-10)
        assert torch.equal(trace.depth[number], depth)
    assert not torch.allclose(logits, model(images()), atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_merging_nothing_is_the_plain_model():
    model = trained_looking()
    logits, trace = trace_model(tome.TokenMerging(model, 0), images())
    torch.testing.assert_close(logits, model(images()), rtol=0, atol=1e-10)
    assert (trace.depth == 4).all() and trace.halting_scores is None


def test_the_most_similar_pairs_merge():
    directions = torch.eye(6, dtype=torch.float64)
    # class token, then patches: 2 and 3 agree but for their length, 1 and 4 nearly, 5 with nobody
    near = directions[1] + 0.1 * directions[5]
    patches = [directions[1], directions[2], 3 * directions[2], near, directions[4]]
    keys = torch.stack([directions[0], *patches])
    # kept 0 and 4 of A, then 1, 3, 5 of B
    assert tome.match(keys[None], 1).tolist() == [[0, 2, 3, 3, 1, 4]]
    assert tome.match(keys[None], 2).tolist() == [[0, 1, 2, 2, 1, 3]]


@pytest.mark.parametrize("tokens", [2, 3, 4, 17])
def test_groups_are_numbered_without_gaps_and_the_class_token_is_alone(tokens):
    keys = torch.randn(3, tokens, 8, generator=torch.Generator().manual_seed(tokens))
    keys[1] = keys[1, :1]  # in one image all are the same as the class token
    for r in range((tokens - 1) // 2 + 1):
        for row in tome.match(keys, r):
            assert row.unique().tolist() == list(range(tokens - r))
            assert row[0] == 0 and (row == 0).sum() == 1
            assert (row[1::2].diff() == 1).all()  # of two in B none merges with the other


@pytest.mark.parametrize(
    ("model", "r"),
    [
        (lambda: timm.create_model("avit_nano"), 2),
        (lambda: without_thresholds(timm.create_model("deit_nano")), 2),
        (lambda: timm.create_model("deit_nano", reg_tokens=1), 2),
        (lambda: torch.nn.Linear(2, 2), 2),
        (lambda: timm.create_model("deit_nano"), -1),
    ],
)
def test_what_cannot_merge_is_refused(model, r):
    with pytest.raises(UserError):
        tome.TokenMerging(model(), r)
