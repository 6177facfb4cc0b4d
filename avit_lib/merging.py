"""Tokens that halt and don't vanish (not in the paper): they live on in one summary token an image, the mean of all
that halted (``fuse``), or each in the most similar patch that goes on (``join``). ``packed`` does so on its buffer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def fuse(summary: Tensor, fused: Tensor, total: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Take the tokens that halt in a layer into the summary token of their image: the mean of all that ever halted.

    ``summary`` [..., D] stands for ``fused`` [..., 1] tokens so far; ``number`` more of sum ``total`` join it. Returns
    both anew. In attention the summary counts as ``fused`` equal tokens: log fused is added to its logits (0 hides it).
    """
    together = fused + number
    return (fused * summary + total) / together.clamp(min=1), together


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


def block_with_summary(
    block: nn.Module, tokens: Tensor, active: Tensor, summary: Tensor, fused: Tensor
) -> tuple[Tensor, Tensor]:
    """A block on the active tokens [B, N, D] and the summary [B, 1, D] of ``fused`` [B, 1, 1] halted ones."""
    tokens = torch.cat([tokens, summary.to(tokens.dtype)], dim=1)
    bias = torch.cat([active, fused[..., 0]], dim=1).log()  # of an active token log 1 = 0, of a halted one -inf
    tokens = block(tokens, attn_mask=bias[:, None, None, :].to(tokens.dtype))
    return tokens[:, :-1], tokens[:, -1:]
