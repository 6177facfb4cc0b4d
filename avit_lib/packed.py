"""Packed execution: tokens that halt leave the computation, so that what is saved is time.

The active tokens of all images lie one after another in a single buffer [T, D]:

    image 0: class patch patch patch | image 1: class patch patch | image 2: class patch

Linear layers, norms and MLPs work on single tokens and never notice; attention runs inside each image (``ATTENTION``
holds the ways to do that). After each layer the tokens that halted leave: one gather closes the gaps and, on the way,
sorts the images by their number of tokens, so that equal ones lie side by side. Results, trace and gradients are those
of masked execution (``models.run_masked``): a halted token is attended by nobody there, and gone here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avit_lib.halting import HaltingState, HaltingTrace, halting_score, halting_step, initial_state


@dataclass(frozen=True)
class Layout:
    """Where the T tokens of the buffer come from, and which of the S images with active tokens they belong to."""

    index: Tensor  # [T] image * N + position: where the token stood in [B, N]
    segment: Tensor  # [T] which of the images in the buffer it belongs to, 0..S-1
    counts: Tensor  # [S] tokens of each of these images, most first
    lengths: tuple[int, ...]  # the same numbers on the host

    @property
    def starts(self) -> Tensor:
        """[S] where each image begins; its class token lies there until it halts."""
        return self.counts.cumsum(0) - self.counts


# --- attention inside each image: q, k, v [T, heads, d] -> [T, heads, d] ----------------------------------------------


def attend_buckets(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout: float) -> Tensor:
    """One call of scaled_dot_product_attention for all images of the same length: no padding, good on CPUs."""
    buckets = [(length, len(list(run))) for length, run in groupby(layout.lengths)]
    sizes = [length * images for length, images in buckets]
    outputs = []
    for (length, images), *qkv in zip(buckets, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        query, key, value = (x.unflatten(0, (images, length)).transpose(1, 2) for x in qkv)
        output = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)  # [images, heads, length, d]
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend_padded(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout: float) -> Tensor:
    """One masked call for all images, each padded to the longest: plain, and works everywhere."""
    images, longest = len(layout.lengths), max(layout.lengths)
    place = torch.arange(len(layout.index), device=q.device) - layout.starts[layout.segment]  # of a token in its image
    slot = layout.segment * longest + place
    blank = q.new_zeros(images * longest, *q.shape[1:])
    padded = (blank.index_copy(0, slot, x).unflatten(0, (images, longest)) for x in (q, k, v))
    query, key, value = (x.transpose(1, 2) for x in padded)
    present = torch.arange(longest, device=q.device) < layout.counts[:, None]
    mask = present[:, None, None, :]
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return output.transpose(1, 2).flatten(0, 1).index_select(0, slot)


def attend_varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout, dropout: float) -> Tensor:
    """One ragged flash-attention kernel (CUDA, half precision, no dropout)."""
    from torch.nn.attention.varlen import varlen_attn  # here, because it exists for CUDA only

    ends, longest = F.pad(layout.counts.cumsum(0), (1, 0)).int(), max(layout.lengths)
    return varlen_attn(q, k, v, ends, ends, longest, longest)


ATTENTION: dict[str, Callable[[Tensor, Tensor, Tensor, Layout, float], Tensor]] = {
    "buckets": attend_buckets,
    "padded": attend_padded,
    "varlen": attend_varlen,
}


def pick_attention(q: Tensor, dropout: float) -> str:
    """The name of the fastest way to attend for the device and type of ``q``."""
    if q.device.type != "cuda":
        return "buckets"
    return "varlen" if q.dtype in (torch.float16, torch.bfloat16) and dropout == 0 else "padded"


# --- one transformer block on the buffer ------------------------------------------------------------------------------


def packed_block(block: nn.Module, tokens: Tensor, layout: Layout, attention: str | None = None) -> Tensor:
    """timm's Block on a packed buffer: tokens [T, D] -> [T, D]. Stochastic depth drops whole images, as timm does."""
    attended = packed_attention(block.attn, block.norm1(tokens), layout, attention)
    tokens = tokens + _drop_path(block.drop_path1, block.ls1(attended), layout)
    return tokens + _drop_path(block.drop_path2, block.ls2(block.mlp(block.norm2(tokens))), layout)


def packed_attention(module: nn.Module, tokens: Tensor, layout: Layout, attention: str | None = None) -> Tensor:
    """timm's Attention on a packed buffer [T, D], by the way called ``attention`` (default: the fastest)."""
    q, k, v = module.qkv(tokens).unflatten(-1, (3, module.num_heads, module.head_dim)).unbind(1)
    q, k = module.q_norm(q), module.k_norm(k)
    dropout = module.attn_drop.p if module.training else 0.0
    attended = ATTENTION[attention or pick_attention(q, dropout)](q, k, v, layout, dropout)
    return module.proj_drop(module.proj(module.norm(attended.flatten(1))))


def _drop_path(module: nn.Module, tokens: Tensor, layout: Layout) -> Tensor:
    if isinstance(module, nn.Identity) or not module.training:
        return tokens
    kept = module(tokens.new_ones(len(layout.counts), 1))  # one draw an image
    return tokens * kept[layout.segment]


# --- tokens leave -----------------------------------------------------------------------------------------------------


def split_off(layout: Layout, keep: Tensor) -> tuple[Layout, Tensor | None, Tensor]:
    """Let the tokens go for which ``keep`` [T] is False.

    Returns the new layout, which rows of the buffer stay, in their new order (None: all, as they lie), and which go.
    The numbers of tokens that are left come to the host: the only synchronisation of a layer.
    """
    counts = torch.zeros_like(layout.counts).index_add(0, layout.segment, keep.long())
    lengths = counts.tolist()
    total = sum(lengths)
    if total == len(layout.index):
        return layout, None, layout.index[:0]
    counts, by_length = counts.sort(descending=True, stable=True)
    place = torch.empty_like(by_length).scatter(0, by_length, torch.arange(len(by_length), device=keep.device))
    order = torch.where(keep, place[layout.segment], len(lengths)).argsort(stable=True)  # those that go come last
    stay, go = order[:total], order[total:]
    lengths = tuple(sorted((length for length in lengths if length), reverse=True))
    return Layout(layout.index[stay], place[layout.segment[stay]], counts[: len(lengths)], lengths), stay, go


def _select(state: HaltingState, rows: Tensor) -> HaltingState:
    return HaltingState(**{name: value.index_select(0, rows) for name, value in vars(state).items()})


# --- Algorithm 1 on the buffer ----------------------------------------------------------------------------------------


def run_packed(
    blocks: nn.Sequential, tokens: Tensor, gamma: float, beta: float, eps: float, attention: str | None = None
) -> tuple[Tensor, HaltingTrace]:
    """Algorithm 1 without the halted tokens: every token followed to its own halting.

    From the embedded tokens [B, N, D] to the representation [B, 1, D] before the final norm, and the trace; equal to
    ``models.run_masked`` up to rounding, in gradients too.
    """
    images, per_image, _ = tokens.shape
    buffer, layout, state, representation = _start(tokens, gamma, beta)
    scores, weights, gone, ponder, depth = [], [], [], [], []
    for layer, block in enumerate(blocks, start=1):
        buffer = packed_block(block, buffer, layout, attention)
        score = halting_score(buffer, gamma, beta) if layer < len(blocks) else torch.ones_like(state.cumulative)  # h
        state, weight = halting_step(state, score, eps)
        representation, class_weight = _add_class_tokens(representation, buffer, weight, layout, per_image)
        scores.append(score.new_zeros(images * per_image).index_copy(0, layout.index, score))
        weights.append(class_weight)
        index = layout.index
        layout, stay, go = split_off(layout, state.active)
        gone.append(index[go])
        ponder.append(state.ponder[go])
        depth.append(state.depth[go])
        if not layout.lengths:
            break
        if stay is not None:
            buffer, state = buffer.index_select(0, stay), _select(state, stay)
    back = torch.cat(gone).argsort()
    blank = [torch.zeros_like(scores[0])] * (len(blocks) - len(scores))
    trace = HaltingTrace(
        depth=torch.cat(depth)[back].view(images, per_image),
        ponder=torch.cat(ponder)[back].view(images, per_image),
        halting_scores=torch.stack(scores + blank).view(len(blocks), images, per_image).transpose(0, 1),
        output_weights=torch.stack(weights + [torch.zeros_like(weights[0])] * len(blank), dim=1),
    )
    return representation[:, None].to(tokens.dtype), trace


def predict_packed(
    blocks: nn.Sequential, tokens: Tensor, gamma: float, beta: float, eps: float, attention: str | None = None
) -> Tensor:
    """The representation [B, 1, D] alone: an image leaves as soon as its class token has halted.

    Nothing can change its logits any more; see ``run_packed`` for the rest.
    """
    buffer, layout, state, representation = _start(tokens, gamma, beta)
    for layer, block in enumerate(blocks, start=1):
        buffer = packed_block(block, buffer, layout, attention)
        score = halting_score(buffer, gamma, beta) if layer < len(blocks) else torch.ones_like(state.cumulative)  # h
        state, weight = halting_step(state, score, eps)
        representation, _ = _add_class_tokens(representation, buffer, weight, layout, tokens.shape[1])
        goes_on = state.active[layout.starts]  # does the class token?
        layout, stay, _ = split_off(layout, state.active & goes_on[layout.segment])
        if not layout.lengths:
            break
        if stay is not None:
            buffer, state = buffer.index_select(0, stay), _select(state, stay)
    return representation[:, None].to(tokens.dtype)


def _start(tokens: Tensor, gamma: float, beta: float) -> tuple[Tensor, Layout, HaltingState, Tensor]:
    images, per_image, width = tokens.shape
    buffer = tokens.flatten(0, 1)
    index = torch.arange(images * per_image, device=tokens.device)
    counts = torch.full((images,), per_image, device=tokens.device)
    layout = Layout(index, index // per_image, counts, (per_image,) * images)
    return buffer, layout, initial_state(halting_score(buffer, gamma, beta)), tokens.new_zeros(images, width)


def _add_class_tokens(
    representation: Tensor, buffer: Tensor, weight: Tensor, layout: Layout, per_image: int
) -> tuple[Tensor, Tensor]:
    """Add w * t of the class tokens to the representation [B, D]; returns it and these weights w [B]."""
    starts = layout.starts
    first = layout.index[starts]
    is_class = first % per_image == 0  # an image whose class token has left starts with a patch
    class_weight = torch.where(is_class, weight[starts], 0.0)
    image = first // per_image
    added = class_weight[:, None] * buffer[starts]
    weights = class_weight.new_zeros(len(representation)).index_copy(0, image, class_weight)
    return representation.to(added.dtype).index_add(0, image, added), weights
