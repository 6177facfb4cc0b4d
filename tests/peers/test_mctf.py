"""Multi-criteria token fusion against loops over pairs, and an attention map that is fused."""

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import attend_slowly, embed_slowly, noise, refused, scatter

from avit_lib.flops import trace_model
from avit_lib.peers import mctf


def choose_slowly(tokens, worth, size, number):
    """Which row fuses into which other, and the rows that stay, in their new order."""
    likeness = F.cosine_similarity(tokens[:, None], tokens, dim=-1).tolist()
    worth, size = worth.tolist(), size.tolist()

    def attraction(one, other):
        informative = (1 / worth[one] / worth[other]) ** (1 / 20)
        small = (1 / size[one] / size[other]) ** (1 / 40)
        return (likeness[one][other] + 1) / 2 * informative * small

    first, second = range(2, len(tokens), 2), range(1, len(tokens), 2)
    joins = {}
    for asking, asked, goes in ((first, second, number // 2), (second, first, -(-number // 2))):
        free = [row for row in asked if row not in joins]
        best = {row: max(free, key=lambda other, row=row: attraction(row, other)) for row in asking}
        ranked = sorted(best, key=lambda row: -attraction(row, best[row]))
        joins |= {row: best[row] for row in ranked[:goes]}
    return joins, [row for row in (0, *first, *ranked) if row not in joins]


def fuse_slowly(model, image, r):
    """Logits [K] and depth [N] of an image [C, H, W]."""
    tokens, depth = embed_slowly(model, image)
    groups = [[place] for place in range(len(tokens))]  # the first of each is what it still is
    for layer, block in enumerate(model.blocks):
        attn, size = block.attn, torch.tensor([len(group) for group in groups]).double()
        attention, _, _ = attend_slowly(block, tokens, size)
        worth = attention.mean(dim=(0, 1)).detach()
        joins, stay = {}, [*range(len(tokens))]
        if layer and r:
            joins, stay = choose_slowly(tokens, worth, size, min(r, (len(tokens) - 1) // 2))
        belongs = torch.zeros(len(stay), len(tokens)).double()
        for row in range(len(tokens)):
            into = row
            while into in joins:
                into = joins[into]
            belongs[stay.index(into), row] = 1
            if into != row:
                depth[groups[row][0]] = layer + 1
                groups[into] = groups[into] + groups[row]
        groups = [groups[row] for row in stay]
        weights = belongs * worth * size
        weights = weights / weights.sum(dim=1, keepdim=True)
        tokens, attention = weights @ tokens, weights @ attention @ belongs.T
        v = attn.qkv(block.norm1(tokens)).unflatten(-1, (3, attn.num_heads, -1))[:, 2]
        read = attn.norm(torch.einsum("hqk,khd->qhd", attention, v).flatten(1))
        tokens = tokens + block.ls1(attn.proj(read))
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return model.forward_head(model.norm(tokens[None]))[0], depth


@pytest.mark.parametrize("r", [0, 1, 5, 100])
@pytest.mark.parametrize("parts", [{}, dict(qk_norm=True, init_values=0.5, qkv_bias=False)])
def test_it_does_what_a_loop_over_single_images_does(r, parts):
    torch.manual_seed(0)
    model = scatter(timm.create_model("deit_nano", **parts).double())
    images = noise(3, 3, 28, 28)
    logits, trace = trace_model(mctf.fuse_tokens(model, r), images)
    slow, depth = zip(*(fuse_slowly(model, image, r) for image in images), strict=True)
    torch.testing.assert_close(logits, torch.stack(slow))
    assert torch.equal(trace.depth, torch.stack(depth))
    weights = noise(*logits.shape, seed=1)
    found, expected = (
        torch.autograd.grad((weights * said).sum(), [*model.parameters()])
        for said in (logits, torch.stack(slow))
    )
    torch.testing.assert_close(found, expected)
    assert torch.allclose(logits, model(images), atol=1e-6) == (r == 0)


def test_the_class_token_is_alone_and_first_even_among_equals():
    stay, gone, into = mctf.match(torch.ones(1, 17, 8), torch.ones(1, 17, 1), 8)
    assert stay[0, 0] == 0 and sorted([*stay[0], *gone[0]]) == [*range(17)]
    assert into[0, 0] == 0 and into[0, 1:].min() > 0


def test_an_adapter_in_the_attention_is_refused():
    model = timm.create_model("deit_nano")
    model.blocks[1].attn.qkv = torch.nn.Sequential(model.blocks[1].attn.qkv)
    with refused("merge the adapter of qkv first"):
        mctf.fuse_tokens(model, 1)
