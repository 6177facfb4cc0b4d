"""Tokens that halt and don't vanish (not in the paper): each joins the most similar patch that goes on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def most_similar(leaving: Tensor, staying: Tensor, takers: Tensor) -> Tensor:
    """The index [..., H] of the taker [..., A] most similar (cosine) to each token [..., H, D], of [..., A, D]."""
    leaving, staying = (F.normalize(tokens.detach(), dim=-1) for tokens in (leaving, staying))
    similarity = leaving @ staying.transpose(-1, -2)
    return similarity.masked_fill(~takers[..., None, :], -torch.inf).argmax(dim=-1)


def join(tokens: Tensor, size: Tensor, joining: Tensor, weight: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """Let tokens ``joining`` [K, D] become part of those at rows ``into`` [K] of ``tokens`` [T, D].

    ``size`` [T] and ``weight`` [K] say how many tokens each stands for (a weight of 0: it joins nobody). Returns the
    means and the sizes anew. In attention a token counts as ``size`` equal ones (proportional; Bolya et al. 2023).
    """
    gain = torch.zeros_like(size).index_add(0, into, weight)
    together = size + gain
    moved = torch.zeros_like(tokens, dtype=size.dtype).index_add(0, into, weight[:, None] * joining)
    change = (moved - gain[:, None] * tokens) / together[:, None]
    return (tokens + change).to(tokens.dtype), together


def merge_masked(tokens: Tensor, size: Tensor, halts: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Let each token [B, N, D] that ``halts`` join the most similar active patch of its image, if there is one."""
    images, count, width = tokens.shape
    takers = F.pad(active[:, 1:], (1, 0))  # not the class token
    into = most_similar(tokens, tokens, takers) + count * torch.arange(images, device=tokens.device)[:, None]
    weight = torch.where(halts & takers.any(dim=1, keepdim=True), size, 0.0)
    flat = tokens.flatten(0, 1)
    merged, size = join(flat, size.flatten(), flat, weight.flatten(), into.flatten())
    return merged.view(images, count, width), size.view(images, count)


def masked_block(block: nn.Module, tokens: Tensor, active: Tensor, size: Tensor | None) -> Tensor:
    """A block on tokens [B, N, D] of which only the ``active`` [B, N] are attended, each as ``size`` [B, N] of them."""
    # An image without active tokens may attend anywhere: a row of keys all masked would give NaN.
    keys = active | ~active.any(dim=1, keepdim=True)
    mask = keys if size is None else torch.where(keys, size, 0.0).log().to(tokens.dtype)
    return block(tokens, attn_mask=mask[:, None, None, :])
