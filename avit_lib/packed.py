"""Packed execution: tokens that halt leave the computation, so that what is saved is time.

The active tokens of all images lie one after another in a single buffer [T, D]:

    image 0: class patch patch patch | image 1: class patch patch | image 2: class patch

Linear layers, norms and MLPs work on single tokens and never notice; attention runs inside each image. After each layer
the tokens that halted leave: one gather closes the gaps and sorts the images by their number of tokens, so that equal
ones lie side by side. Results, trace and gradients are those of masked execution (``model.run_masked``).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avit_lib.halting import HaltingRule, HaltingTrace, halting_score, trace_of
from avit_lib.merging import join, most_similar


@dataclass(frozen=True)
class Layout:
    """Where the T tokens of the buffer come from, and which of the S images with active tokens they belong to."""

    index: Tensor  # [T] image * N + position: where the token stood in [B, N]
    segment: Tensor  # [T] which of the images in the buffer it belongs to, 0..S-1
    images: Tensor  # [S] the number of each of these images in the batch
    starts: Tensor  # [S] where each of them begins; its class token lies there until it halts
    counts: Tensor  # [S] tokens of each, most first
    lengths: tuple[int, ...]  # the same numbers on the host


# --- attention inside each image: queries, keys and values [T, 3, heads, d] -> [T, heads * d] -------------------------
# ``bias`` [T], if any, is added to the attention logits of each key.


def attend_buckets(qkv: Tensor, layout: Layout, dropout: float, bias: Tensor | None) -> Tensor:
    """One call of scaled_dot_product_attention for all images of the same length: no padding, good on CPUs."""
    buckets = [(length, len(list(run))) for length, run in groupby(layout.lengths)]
    sizes = [length * images for length, images in buckets]
    biases = bias.split(sizes) if bias is not None else [None] * len(sizes)
    outputs = []
    for (length, images), rows, mask in zip(buckets, qkv.split(sizes), biases, strict=True):
        query, key, value = rows.view(images, length, *qkv.shape[1:]).permute(2, 0, 3, 1, 4).unbind()
        mask = None if mask is None else mask.view(images, 1, 1, length)
        output = F.scaled_dot_product_attention(query, key, value, mask, dropout)  # [images, heads, length, d]
        outputs.append(output.transpose(1, 2).reshape(images * length, -1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend_padded(qkv: Tensor, layout: Layout, dropout: float, bias: Tensor | None) -> Tensor:
    """One masked call for all images, each padded to the longest: plain, and works everywhere."""
    images, longest = len(layout.lengths), layout.lengths[0]
    slot = torch.arange(len(qkv), device=qkv.device) + (layout.segment * longest - layout.starts[layout.segment])
    padded = qkv.new_zeros(images * longest, *qkv.shape[1:]).index_copy(0, slot, qkv)
    query, key, value = padded.view(images, longest, *qkv.shape[1:]).permute(2, 0, 3, 1, 4).unbind()
    mask = qkv.new_full((images * longest,), -torch.inf)
    mask = mask.index_copy(0, slot, qkv.new_zeros(len(qkv)) if bias is None else bias)
    output = F.scaled_dot_product_attention(query, key, value, mask.view(images, 1, 1, longest), dropout)
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


# --- one transformer block on the buffer ------------------------------------------------------------------------------


def packed_block(block: nn.Module, tokens: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
    """timm's Block on a packed buffer: tokens [T, D] -> [T, D]. Stochastic depth drops whole images, as timm does."""
    attended = packed_attention(block.attn, block.norm1(tokens), layout, bias)
    tokens = tokens + _drop_path(block.drop_path1, block.ls1(attended), layout)
    return tokens + _drop_path(block.drop_path2, block.ls2(block.mlp(block.norm2(tokens))), layout)


def packed_attention(module: nn.Module, tokens: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
    """timm's Attention on a packed buffer [T, D]."""
    qkv = module.qkv(tokens).view(-1, 3, module.num_heads, module.head_dim)
    if not isinstance(module.q_norm, nn.Identity):
        q, k, v = qkv.unbind(1)
        qkv = torch.stack([module.q_norm(q), module.k_norm(k), v], dim=1)
    dropout = module.attn_drop.p if module.training else 0.0
    bias = None if bias is None else bias.to(qkv.dtype)
    attended = pick_attention(qkv, dropout, bias)(qkv, layout, dropout, bias)
    return module.proj_drop(module.proj(module.norm(attended)))


def _drop_path(module: nn.Module, tokens: Tensor, layout: Layout) -> Tensor:
    if isinstance(module, nn.Identity) or not module.training:
        return tokens
    return tokens * module(tokens.new_ones(len(layout.counts), 1))[layout.segment]  # one draw an image


# --- tokens leave -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """Who of the T tokens of a layer goes on, and who leaves."""

    stay: Tensor  # [T - K] rows of the buffer that go on, in their new order
    leave: Tensor  # [K] rows that leave; those of one image follow each other
    segment: Tensor  # [T] the image of each in the new layout; those that have no tokens left come last
    most: int  # that an image lost


def split_off(layout: Layout, keep: Tensor) -> tuple[Layout, Move | None]:
    """The layout without the tokens for which ``keep`` [T] is False, and the way there (None: all stay as they lie)."""
    counts = torch.zeros_like(layout.counts).index_add_(0, layout.segment, keep.long())
    lengths = counts.tolist()  # on the host: the only synchronisation of a layer
    total = sum(lengths)
    if total == len(keep):
        return layout, None
    most = max(before - after for before, after in zip(layout.lengths, lengths, strict=True))
    counts, by_length = counts.sort(descending=True, stable=True)
    segment = by_length.argsort()[layout.segment]
    order = torch.where(keep, segment, len(lengths)).argsort(stable=True)  # those that leave come last
    move = Move(order[:total], order[total:], segment, most)
    lengths = tuple(sorted(filter(None, lengths), reverse=True))
    counts, images = counts[: len(lengths)], layout.images[by_length[: len(lengths)]]
    starts = counts.cumsum(0) - counts
    return Layout(layout.index[move.stay], segment[move.stay], images, starts, counts, lengths), move


# --- Algorithm 1 on the buffer ----------------------------------------------------------------------------------------


def packed_layers(
    blocks: nn.Sequential, tokens: Tensor, rule: HaltingRule, every_token: bool
) -> Iterator[tuple[Layout, Tensor, Tensor, Tensor]]:
    """Algorithm 1 on the embedded tokens [B, N, D], without those that halted.

    Yields after each layer the layout of the buffer, its tokens [T, D], their scores h [T] and their output weights
    w [T]. Unless ``every_token`` is followed to its own halting, an image leaves as soon as its class token has halted:
    nothing can change its representation any more.
    """
    (images, count, _), buffer = tokens.shape, tokens.flatten(0, 1)
    index = torch.arange(len(buffer), device=buffer.device)
    counts = torch.full((images,), count, device=buffer.device)
    layout = Layout(index, index // count, index[:images], index[::count], counts, (count,) * images)
    cumulative = torch.zeros_like(halting_score(buffer, rule.gamma, rule.beta))  # cumul
    size = None  # [T] how many tokens each one stands for; None: each for itself
    for layer, block in enumerate(blocks, start=1):
        buffer = packed_block(block, buffer, layout, bias=None if size is None else size.log())
        score = halting_score(buffer, rule.gamma, rule.beta)  # h
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
        layout, move = split_off(layout, active if every_token else active & active[layout.starts][layout.segment])
        if not layout.lengths:
            return
        if move is None:
            continue
        if rule.merge_halted:
            size = torch.ones_like(score) if size is None else size
            buffer, size = _merge(buffer, size, layout, move, images, count)
        else:
            buffer = buffer.index_select(0, move.stay)
        cumulative = cumulative.index_select(0, move.stay)


def _merge(buffer: Tensor, size: Tensor, layout: Layout, move: Move, images: int, count: int) -> tuple[Tensor, Tensor]:
    """Let each token that leaves join the most similar patch of its image among those that stay.

    From buffer and sizes, [T, D] and [T], of the layer before to those of the new ``layout``. Both sides are padded, an
    image a row; the last row is for images that are gone, whose tokens join nobody.
    """

    def padded(values: Tensor, image: Tensor, place: Tensor, longest: int) -> Tensor:
        rows = values.new_zeros(len(layout.lengths) + 1, longest, *values.shape[1:])
        return rows.index_put((image, place), values.detach())

    leaving, weight, image = buffer[move.leave], size[move.leave], move.segment[move.leave]
    buffer, size = buffer.index_select(0, move.stay), size[move.stay]
    number = torch.arange(len(leaving), device=buffer.device)
    first = torch.full((images,), len(leaving), device=buffer.device).scatter_reduce(0, image, number, "amin")
    slot, image = number - first[image], image.clamp(max=len(layout.lengths))  # where it stands among its image's
    place = torch.arange(len(buffer), device=buffer.device) - layout.starts[layout.segment]
    patches = layout.index % count > 0  # not the class token
    takers = padded(patches, layout.segment, place, layout.lengths[0])
    staying = padded(buffer, layout.segment, place, layout.lengths[0])
    into = most_similar(padded(leaving, image, slot, move.most), staying, takers)[image, slot]
    welcome = takers.any(dim=1)[image]
    into = torch.where(welcome, F.pad(layout.starts, (0, 1))[image] + into, 0)
    return join(buffer, size, leaving, torch.where(welcome, weight, 0.0), into)


# --- what a model asks for --------------------------------------------------------------------------------------------


def predict_packed(blocks: nn.Sequential, tokens: Tensor, rule: HaltingRule) -> Tensor:
    """The representation [B, 1, D] before the final norm of the embedded tokens [B, N, D], and nothing else."""
    representation = 0.0 * tokens[:, 0]
    for layout, buffer, _, weight in packed_layers(blocks, tokens, rule, every_token=False):
        added = weight[layout.starts, None] * buffer[layout.starts]  # w * t of the class tokens
        representation = representation.to(added.dtype).index_add(0, layout.images, added)
    return representation[:, None].to(tokens.dtype)


def run_packed(blocks: nn.Sequential, tokens: Tensor, rule: HaltingRule) -> tuple[Tensor, HaltingTrace]:
    """The same as ``model.run_masked``: representation [B, 1, D] and trace of the embedded tokens [B, N, D]."""
    images, count, width = tokens.shape
    depth = torch.zeros(images * count, dtype=torch.long, device=tokens.device)  # N_k
    scores, class_tokens = [], []
    for layout, buffer, score, _ in packed_layers(blocks, tokens, rule, every_token=True):
        scores.append(score.new_zeros(images * count).index_copy(0, layout.index, score))
        depth.index_add_(0, layout.index, torch.ones_like(layout.index))
        # Of an image whose class token has halted this is another token; its weight is 0.
        class_tokens.append(buffer.new_zeros(images, width).index_copy(0, layout.images, buffer[layout.starts]))
    scores = torch.stack(scores).view(-1, images, count).transpose(0, 1)
    scores = F.pad(scores, (0, 0, 0, len(blocks) - len(class_tokens)))  # layers that nobody reached
    trace = trace_of(scores, depth.view(images, count))
    weights = trace.output_weights[:, : len(class_tokens), None]  # w
    representation = (weights * torch.stack(class_tokens, dim=1)).sum(dim=1, keepdim=True)
    return representation.to(tokens.dtype), trace
