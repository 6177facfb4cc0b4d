"""Packed execution: tokens that halt, or merge, leave the computation.

The active tokens of all images lie one after another in a single buffer [T, D]:

    image 0: class patch patch patch | image 1: class patch patch | image 2: class patch

Linear layers, norms and MLPs work on single tokens and never notice; attention runs inside each
image. After each layer the tokens that halted leave: one gather closes the gaps and sorts the
images by their number of tokens, so that equal ones lie side by side. Results, trace and gradients
are those of masked execution (``model.run_masked``).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avit_lib.backbone import call
from avit_lib.halting import HaltingRule, HaltingTrace, decide, fade, halting_score


@dataclass(frozen=True)
class Layout:
    """Where the T tokens of the buffer come from, and to which of S images they belong."""

    index: Tensor  # [T] image * N + position: where the token stood in [B, N]
    segment: Tensor  # [T] which of the images in the buffer it belongs to, 0..S-1
    images: Tensor  # [S] the number of each of these images in the batch
    starts: Tensor  # [S] where each of them begins; its class token lies there until it halts
    lengths: tuple[int, ...]  # S numbers on the host: tokens of each, most first


# --- attention inside each image ------------------------------------------------------------------


def to_dense(values: Tensor, layout: Layout) -> list[Tensor]:
    """``values`` [T, ...] of the tokens as tensors [images, length, ...], one for each length.

    So attention needs no padding: images of one length are attended in one call.
    """
    buckets = Counter(layout.lengths)  # how many images have each length
    parts = values.split([length * images for length, images in buckets.items()])
    return [part.unflatten(0, (-1, length)) for part, length in zip(parts, buckets, strict=True)]


def to_packed(tables: list[Tensor]) -> Tensor:
    """The values [T, ...] of the tokens in ``tables`` [images, length, ...] as of ``to_dense``."""
    values = [table.flatten(0, 1) for table in tables]
    return values[0] if len(values) == 1 else torch.cat(values)


def attend(qkv: Tensor, layout: Layout, dropout: float, bias: Tensor | None) -> Tensor:
    """Attention inside each image: queries, keys and values [T, 3, heads, d] -> [T, heads * d].

    ``bias`` [T], if any, is added to the attention logits of each key.
    """
    ragged = layout.lengths[0] != layout.lengths[-1]
    half = qkv.dtype in (torch.float16, torch.bfloat16)
    if qkv.is_cuda and ragged and half and not dropout and knows_flash_attention(qkv.device):
        return attend_varlen(qkv, layout, bias)
    if qkv.device.type == "cpu" and half and (ragged or qkv.requires_grad):
        # In half precision a CPU makes a kernel for each length; and backward it is slow.
        with torch.autocast("cpu", enabled=False):
            return attend(qkv.float(), layout, dropout, bias).to(qkv.dtype)
    tables = to_dense(qkv, layout)
    masks: list[Tensor | None] = [None] * len(tables)
    if bias is not None:
        masks = [one[:, None, None] for one in to_dense(bias.to(qkv.dtype), layout)]
    outputs = []
    for table, mask in zip(tables, masks, strict=True):
        query, key, value = table.permute(2, 0, 3, 1, 4)  # [images, heads, length, d]
        output = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        outputs.append(output.transpose(1, 2).flatten(2))
    return to_packed(outputs)


@cache
def knows_flash_attention(device: torch.device) -> bool:
    """Whether a CUDA device is new enough for the kernel of ``attend_varlen``."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def attend_varlen(qkv: Tensor, layout: Layout, bias: Tensor | None) -> Tensor:
    """As ``attend``, by one ragged flash-attention kernel (CUDA, half precision, no dropout)."""
    from torch.nn.attention.varlen import varlen_attn  # here, because it exists for CUDA only

    width, scale = qkv.shape[-1], qkv.shape[-1] ** -0.5
    query, key, value = (qkv if bias is None else fold_bias(qkv, bias / scale)).unbind(1)
    ends, longest = F.pad(layout.starts, (0, 1), value=len(qkv)).int(), layout.lengths[0]
    output = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale)
    return output[..., :width].flatten(1)


def fold_bias(qkv: Tensor, bias: Tensor) -> Tensor:
    """Queries, keys and values [T, 3, heads, d + 8] whose products q k have ``bias`` [T] in them.

    In half precision a second channel adds what rounding takes from the first.
    """
    rounded = bias.to(qkv.dtype)
    more = qkv.new_zeros(*qkv.shape[:3], 8)  # kernels want multiples of 8
    more[:, 0, :, :2] = 1
    more[:, 1, :, 0] = rounded[:, None]
    more[:, 1, :, 1] = (bias - rounded)[:, None]
    return torch.cat([qkv, more], dim=-1)


# --- one transformer block on the buffer ----------------------------------------------------------


def packed_block(
    block: nn.Module, tokens: Tensor, layout: Layout, bias: Tensor | None = None
) -> Tensor:
    """timm's Block on a packed buffer: tokens [T, D] -> [T, D]; ``bias`` as of ``attend``.

    Stochastic depth drops whole images, as timm does.
    """
    return packed_mlp(block, packed_attention(block, tokens, layout, bias)[0], layout)


def packed_attention(
    block: nn.Module, tokens: Tensor, layout: Layout, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The first half of a block: tokens [T, D] after attention, and what attended.

    These are queries, keys and values [T, 3, heads, d].
    """
    module = block.attn
    qkv = module.qkv(block.norm1(tokens)).view(-1, 3, module.num_heads, module.head_dim)
    if any(type(one) is not nn.Identity for one in (module.q_norm, module.k_norm)):
        q, k, v = qkv.unbind(1)
        qkv = torch.stack([module.q_norm(q), module.k_norm(k), v], dim=1)
    dropout = module.attn_drop.p if module.training else 0.0
    attended = module.norm(attend(qkv, layout, dropout, bias))
    attended = module.proj_drop(module.proj(attended))
    return tokens + drop_path(block.drop_path1, block.ls1(attended), layout), qkv


def packed_mlp(block: nn.Module, tokens: Tensor, layout: Layout) -> Tensor:
    """The second half of a block: tokens [T, D] after the MLP."""
    return tokens + drop_path(block.drop_path2, block.ls2(block.mlp(block.norm2(tokens))), layout)


def drop_path(module: nn.Module, tokens: Tensor, layout: Layout) -> Tensor:
    """Stochastic depth on tokens [T, D], with one draw an image."""
    if isinstance(module, nn.Identity) or not module.training:
        return tokens
    return tokens * module(tokens.new_ones(len(layout.lengths), 1))[layout.segment]


# --- tokens leave ---------------------------------------------------------------------------------


def whole_layout(images: int, count: int, device: torch.device) -> Layout:
    """The layout of ``images`` with ``count`` tokens each, before anybody has left."""
    index = torch.arange(images * count, device=device)
    return Layout(index, index // count, index[:images], index[::count], (count,) * images)


def split_off(layout: Layout, keep: Tensor) -> tuple[Layout, Tensor | None]:
    """The layout of the tokens to ``keep`` [T], and the rows that stay (None: all as they lie)."""
    counts = torch.zeros_like(layout.images).index_add_(0, layout.segment, keep.long()).tolist()
    total = sum(counts)  # known on the host: the only synchronisation of a layer
    if total == len(keep):
        return layout, None
    stay = torch.nonzero_static(keep, size=total)[:, 0]
    if len(counts) == 1 and total:  # one image: nothing is to be sorted
        index, segment = layout.index[stay], layout.segment[:total]
        return Layout(index, segment, layout.images, layout.starts, (total,)), stay
    by_length = sorted(range(len(counts)), key=counts.__getitem__, reverse=True)
    rows = stay.split(counts)
    stay = torch.cat([rows[image] for image in by_length])
    lengths = tuple(counts[image] for image in by_length if counts[image])
    images = layout.images[by_length[: len(lengths)]]
    ends = torch.tensor(lengths, dtype=torch.long, device=keep.device).cumsum(0)
    starts = F.pad(ends[:-1], (1, 0))
    segment = torch.repeat_interleave(ends - starts, output_size=total)
    return Layout(layout.index[stay], segment, images, starts, lengths), stay


# --- Algorithm 1 on the buffer --------------------------------------------------------------------


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
    images, count, _ = tokens.shape
    buffer, layout = tokens.flatten(0, 1), whole_layout(images, count, tokens.device)
    cumulative = torch.zeros_like(halting_score(buffer, rule))  # cumul
    for layer, block in enumerate(blocks, start=1):
        bias = fade(cumulative, rule) if rule.task_gradient else None
        buffer = run(packed_block, block, buffer, layout, bias)
        last = layer == len(blocks)
        score = halting_score(buffer, rule, last)  # h
        cumulative, halts, weight = decide(cumulative, score, rule.eps)
        yield layout, buffer, score, weight
        if last:
            return
        leaves = halts if every_token else halts | halts[layout.starts][layout.segment]
        layout, stay = split_off(layout, ~leaves)
        if not layout.lengths:
            return
        if stay is not None:
            buffer, cumulative = buffer.index_select(0, stay), cumulative.index_select(0, stay)


# The compiler has nothing to gain on lengths that differ in every batch: it would compile for each.
@torch.compiler.disable
def run_packed(
    blocks: nn.Sequential,
    tokens: Tensor,
    rule: HaltingRule,
    every_token: bool = True,
    run: Callable = call,
) -> tuple[Tensor, HaltingTrace | None]:
    """As ``model.run_masked``: representation [B, 1, D] and trace of embedded tokens [B, N, D].

    Without ``every_token`` an image is computed until its class token halts, and has no trace.
    """
    images, count, _ = tokens.shape
    representation, zeros = 0.0 * tokens[:, 0], torch.zeros_like(halting_score(tokens, rule))
    depth = zeros.flatten().long()  # N_k
    remainder = zeros.flatten()  # R
    scores = zeros.new_zeros(len(blocks), images * count)  # h
    weights = zeros.new_zeros(len(blocks), images)  # w of the class tokens
    layers = packed_layers(blocks, tokens, rule, every_token, run)
    for layer, (layout, buffer, score, weight) in enumerate(layers):
        class_weight = weight[layout.starts]
        if every_token:
            # Of an image whose class token has halted, the first token is a patch.
            is_class = layout.index[layout.starts] % count == 0
            class_weight = torch.where(is_class, class_weight, 0.0)
            depth[layout.index] = layer + 1
            remainder[layout.index] = weight  # in the end, that of the layer in which it halts
            scores[layer, layout.index] = score
            weights[layer, layout.images] = class_weight
        added = class_weight[:, None] * buffer[layout.starts]  # w * t
        representation = representation.to(added.dtype).index_add(0, layout.images, added)
    representation = representation[:, None].to(tokens.dtype)
    if not every_token:
        return representation, None
    depth, remainder = depth.view(images, count), remainder.view(images, count)
    scores = scores.view(-1, images, count).transpose(0, 1)
    return representation, HaltingTrace(depth, depth + remainder, scores, weights.T)
