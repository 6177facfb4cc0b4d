"""Token merging of one image, by loops over lists of places: a reference for two methods."""

import torch
import torch.nn.functional as F


def merge_slowly(model, image, choose):
    """Logits [K] and depth [N] of an image [C, H, W].

    ``choose(layer, keys, worth)`` says, of a layer 0..L-1, keys [M, d] of length 1 and what the
    class token takes from each [M], which row joins which other, and the rows that stay, in their
    new order.
    """
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    groups = [[place] for place in range(len(tokens))]  # the first of each is what it still is
    depth = torch.full((len(tokens),), len(model.blocks))
    for layer, block in enumerate(model.blocks):
        size = torch.tensor([len(group) for group in groups]).double()
        qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, block.attn.num_heads, -1))
        q, k, v = qkv.unbind(1)
        q, k = block.attn.q_norm(q), block.attn.k_norm(k)
        logits = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5 + size.log()
        attention = logits.softmax(dim=-1)
        taken = torch.einsum("hqk,khd->qhd", attention, v).flatten(1)
        tokens = tokens + block.ls1(block.attn.proj(block.attn.norm(taken)))
        worth = (attention[:, 0].T * v.norm(dim=-1)).mean(dim=1)
        joins, kept = choose(layer, F.normalize(k.mean(dim=1), dim=-1), worth)
        for one in joins:
            depth[groups[one][0]] = layer + 1
        means, joined = [], []
        for place in kept:
            members = [place, *(one for one, into in joins.items() if into == place)]
            means.append(size[members] @ tokens[members] / size[members].sum())
            joined.append([first for one in members for first in groups[one]])
        tokens, groups = torch.stack(means), joined
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    whole = torch.empty(len(depth), tokens.shape[1]).double()
    for group, token in zip(groups, tokens, strict=True):
        whole[group] = token
    return model.forward_head(model.norm(whole[None]))[0], depth
