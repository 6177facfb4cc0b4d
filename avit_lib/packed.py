"""Packed execution: tokens that halt leave the computation, so that what is saved is time.

The active tokens of all images lie one after another in a single buffer [T, D]:

    image 0: class patch patch patch | image 1: class patch patch | image 2: class patch

Linear layers, norms and MLPs work on single tokens and never notice; attention runs inside each
image. After each layer the tokens that halted leave: one gather closes the gaps and sorts the
images by their number of tokens, so that equal ones lie side by side. Results, trace and gradients
are those of masked execution (``model.run_masked``).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avit_lib.halting import HaltingRule, HaltingTrace, halting_score, trace_of


@dataclass(frozen=True)
class Layout:
    """Where the T tokens of the buffer come from, and which of the S images with active tokens they
    belong to.
    """

    index: Tensor  # [T] image * N + position: where the token stood in [B, N]
    segment: Tensor  # [T] which of the images in the buffer it belongs to, 0..S-1
    images: Tensor  # [S] the number of each of these images in the batch
    starts: Tensor  # [S] where each of them begins; its class token lies there until it halts
    counts: Tensor  # [S] tokens of each, most first
    lengths: tuple[int, ...]  # the same numbers on the host


# --- attention inside each image: queries, keys and values [T, 3, heads, d] -> [T, heads * d] -----
# ``bias`` [T], if any, is added to the attention logits of each key.


def attend_buckets(qkv: Tensor, layout: Layout, dropout: float, bias: Tensor | None) -> Tensor:
    """One call of scaled_dot_product_attention for all images of the same length: no padding, good
    on CPUs.
    """
    buckets = [(length, len(list(run))) for length, run in groupby(layout.lengths)]
    sizes = [length * images for length, images in buckets]
    biases = bias.split(sizes) if bias is not None else [None] * len(sizes)
    outputs = []
    for (length, images), rows, mask in zip(buckets, qkv.split(sizes), biases, strict=True):
        query, key, value = (
            rows.view(images, length, *qkv.shape[1:]).permute(2, 0, 3, 1, 4).unbind()
        )
        mask = None if mask is None else mask.view(images, 1, 1, length)
        output = F.scaled_dot_product_attention(
            query, key, value, mask, dropout
        )  # [images, heads, length, d]
        outputs.append(output.transpose(1, 2).reshape(images * length, -1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend_padded(qkv: Tensor, layout: Layout, dropout: float, bias: Tensor | None) -> Tensor:
    """One masked call for all images, each padded to the longest: plain, and works everywhere."""
    images, longest = len(layout.lengths), layout.lengths[0]
    slot = torch.arange(len(qkv), device=qkv.device) + (
        layout.segment * longest - layout.starts[layout.segment]
    )
    padded = qkv.new_zeros(images * longest, *qkv.shape[1:]).index_copy(0, slot, qkv)
    query, key, value = padded.view(images, longest, *qkv.shape[1:]).permute(2, 0, 3, 1, 4).unbind()
    mask = qkv.new_full((images * longest,), -torch.inf)
    mask = mask.index_copy(0, slot, qkv.new_zeros(len(qkv)) if bias is None else bias)
    output = F.scaled_dot_product_attention(
        query, key, value, mask.view(images, 1, 1, longest), dropout
    )
    return output.transpose(1, 2).reshape(images * longest, -1).index_select(0, slot)


def attend_varlen(qkv: Tensor, layout: Layout, dropout: float, bias: Tensor | None) -> Tensor:
    """One ragged flash-attention kernel (CUDA, half precision, neither dropout nor bias)."""
    from torch.nn.attention.varlen import varlen_attn  # here, because it exists for CUDA only

    ends, longest = F.pad(layout.counts.cumsum(0), (1, 0)).int(), layout.lengths[0]
    return varlen_attn(*qkv.unbind(1), ends, ends, longest, longest).flatten(1)


def pick_attention(qkv: Tensor, dropout: float, bias: Tensor | None) -> Callable[..., Tensor]:
    """The fastest way to attend for the device and type of ``qkv``."""
    if qkv.device.type != "cuda":
        return attend_buckets
    half = qkv.dtype in (torch.float16, torch.bfloat16)
    return attend_varlen if half and dropout == 0 and bias is None else attend_padded


# --- one transformer block on the buffer ----------------------------------------------------------


def packed_block(block: nn.Module, tokens: Tensor, layout: Layout) -> Tensor:
    """timm's Block on a packed buffer: tokens [T, D] -> [T, D]. Stochastic depth drops whole
    images, as timm does.
    """
    return packed_mlp(block, packed_attending(block, tokens, layout)[0], layout)


def packed_attending(
    block: nn.Module, tokens: Tensor, layout: Layout, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The first half of the block: tokens [T, D] after attention, and queries, keys, values [T, 3,
    heads, d].
    """
    attended, qkv = packed_attention(block.attn, block.norm1(tokens), layout, bias)
    return tokens + _drop_path(block.drop_path1, block.ls1(attended), layout), qkv


def packed_mlp(block: nn.Module, tokens: Tensor, layout: Layout) -> Tensor:
    """The second half of the block: tokens [T, D] after the MLP."""
    return tokens + _drop_path(block.drop_path2, block.ls2(block.mlp(block.norm2(tokens))), layout)


def packed_attention(
    module: nn.Module, tokens: Tensor, layout: Layout, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """timm's Attention on a packed buffer [T, D]; returns its output and the queries, keys, values
    [T, 3, heads, d].
    """
    qkv = module.qkv(tokens).view(-1, 3, module.num_heads, module.head_dim)
    if not isinstance(module.q_norm, nn.Identity):
        q, k, v = qkv.unbind(1)
        qkv = torch.stack([module.q_norm(q), module.k_norm(k), v], dim=1)
    dropout = module.attn_drop.p if module.training else 0.0
    bias = None if bias is None else bias.to(qkv.dtype)
    attended = pick_attention(qkv, dropout, bias)(qkv, layout, dropout, bias)
    return module.proj_drop(module.proj(module.norm(attended))), qkv


def _drop_path(module: nn.Module, tokens: Tensor, layout: Layout) -> Tensor:
    if isinstance(module, nn.Identity) or not module.training:
        return tokens
    return (
        tokens * module(tokens.new_ones(len(layout.counts), 1))[layout.segment]
    )  # one draw an image


# --- tokens leave ---------------------------------------------------------------------------------


def whole_layout(images: int, count: int, device: torch.device) -> Layout:
    """The layout of so many images with ``count`` tokens each, before anybody has left."""
    index = torch.arange(images * count, device=device)
    counts = torch.full((images,), count, device=device)
    return Layout(index, index // count, index[:images], index[::count], counts, (count,) * images)


def split_off(layout: Layout, keep: Tensor) -> tuple[Layout, Tensor | None]:
    """The layout without the tokens for which ``keep`` [T] is False, and the rows that stay (None:
    all as they lie).
    """
    counts = torch.zeros_like(layout.counts).index_add_(0, layout.segment, keep.long())
    lengths = counts.tolist()  # on the host: the only synchronisation of a layer
    total = sum(lengths)
    if total == len(keep):
        return layout, None
    counts, by_length = counts.sort(descending=True, stable=True)
    segment = by_length.argsort()[layout.segment]
    stay = torch.where(keep, segment, len(lengths)).argsort(stable=True)[
        :total
    ]  # those that leave come last
    lengths = tuple(sorted(filter(None, lengths), reverse=True))
    counts, images = counts[: len(lengths)], layout.images[by_length[: len(lengths)]]
    starts = counts.cumsum(0) - counts
    return Layout(layout.index[stay], segment[stay], images, starts, counts, lengths), stay


# --- Algorithm 1 on the buffer --------------------------------------------------------------------


def call(function: Callable, *arguments: Any) -> Any:
    """Call a ``function`` that computes a layer, as it is (``TokensLeave.run`` may checkpoint
    it).
    """
    return function(*arguments)


def packed_layers(
    blocks: nn.Sequential,
    tokens: Tensor,
    rule: HaltingRule,
    every_token: bool,
    run: Callable = call,
) -> Iterator[tuple[Layout, Tensor, Tensor, Tensor]]:
    """Algorithm 1 on the embedded tokens [B, N, D], without those that halted.

    Yields after each layer the layout of the buffer, its tokens [T, D], their scores h [T] and
    their output weights w [T]. Unless ``every_token`` is followed to its own halting, an image
    leaves as soon as its class token has halted: nothing can change its representation any more.
    """
    (images, count, _), buffer = tokens.shape, tokens.flatten(0, 1)
    layout = whole_layout(images, count, buffer.device)
    cumulative = torch.zeros_like(halting_score(buffer, rule))  # cumul
    for layer, block in enumerate(blocks, start=1):
        buffer = run(packed_block, block, buffer, layout)
        score = halting_score(buffer, rule)  # h
        if layer == len(blocks):
            score = torch.ones_like(score)
        elif not rule.class_token_halts:
            score = score.index_fill(0, layout.starts, 0.0)
        remainder = 1 - cumulative  # R
        cumulative = cumulative + score  # cumul += h
        active = cumulative < 1 - rule.eps  # m
        yield layout, buffer, score, torch.where(active, score, remainder)  # w
        if layer == len(blocks):
            return
        # Unless every token is followed: does the class token go on?
        layout, stay = split_off(
            layout, active if every_token else active & active[layout.starts][layout.segment]
        )
        if not layout.lengths:
            return
        if stay is not None:
            buffer, cumulative = buffer.index_select(0, stay), cumulative.index_select(0, stay)


# --- what a model asks for ------------------------------------------------------------------------


# The compiler has nothing to gain on lengths that differ in every batch: it would compile for each
# again.


@torch.compiler.disable
def predict_packed(
    blocks: nn.Sequential, tokens: Tensor, rule: HaltingRule, run: Callable = call
) -> Tensor:
    """The representation [B, 1, D] before the final norm of the embedded tokens [B, N, D], and
    nothing else.
    """
    representation = 0.0 * tokens[:, 0]
    for layout, buffer, _, weight in packed_layers(blocks, tokens, rule, False, run):
        added = weight[layout.starts, None] * buffer[layout.starts]  # w * t of the class tokens
        representation = representation.to(added.dtype).index_add(0, layout.images, added)
    return representation[:, None].to(tokens.dtype)


@torch.compiler.disable
def run_packed(
    blocks: nn.Sequential, tokens: Tensor, rule: HaltingRule, run: Callable = call
) -> tuple[Tensor, HaltingTrace]:
    """The same as ``model.run_masked``: representation [B, 1, D] and trace of the embedded tokens
    [B, N, D].
    """
    images, count, width = tokens.shape
    depth = torch.zeros(images * count, dtype=torch.long, device=tokens.device)  # N_k
    scores, class_tokens = [], []
    for layout, buffer, score, _ in packed_layers(blocks, tokens, rule, True, run):
        scores.append(score.new_zeros(images * count).index_copy(0, layout.index, score))
        depth.index_add_(0, layout.index, torch.ones_like(layout.index))
        # Of an image whose class token has halted this is another token; its weight is 0.
        class_tokens.append(
            buffer.new_zeros(images, width).index_copy(0, layout.images, buffer[layout.starts])
        )
    scores = torch.stack(scores).view(-1, images, count).transpose(0, 1)
    scores = F.pad(scores, (0, 0, 0, len(blocks) - len(class_tokens)))  # layers that nobody reached
    trace = trace_of(scores, depth.view(images, count))
    weights = trace.output_weights[:, : len(class_tokens), None]  # w
    representation = (weights * torch.stack(class_tokens, dim=1)).sum(dim=1, keepdim=True)
    return representation.to(tokens.dtype), trace
