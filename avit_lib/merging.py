"""Any VisionTransformer of timm's, adaptive without training (ours, not in the paper of A-ViT).

Each layer merges tokens between attention and MLP, as ToMe does (Bolya et al., ICLR 2023, arXiv 2210.09461), but not
the same number in every image. The score of a token is its similarity to the token that can stand for it, minus a
weight times the logarithm of its importance to the class token; it merges where the score exceeds the threshold of the
layer. As in A-ViT, each token decides how deep it is computed, but its scores don't add up over the layers. ``adapt``
sets the thresholds on a few hundred images, without labels, for a wanted share of FLOPs saved.

Merging by thresholds is not new: they were learned (LTMP; Bonnaerens and Dambre 2023), calibrated (DyMU, 2025) and set
by a formula (ATM, arXiv 2505.15160). New is that images with different numbers of tokens run as one packed batch: what
has merged is computed no more.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avit_lib.backbone import TokensLeave, is_exporting, why_not_plain
from avit_lib.errors import UserError
from avit_lib.flops import block_flops, fixed_flops, plain_flops
from avit_lib.packed import Layout, packed_attending, packed_mlp, split_off, whole_layout

TOLERANCE = 0.005  # share of FLOPs by which a calibration may miss the wish
MOST = 0.8  # share of FLOPs that may be asked for
IMPORTANCE_WEIGHT = 0.2  # of the logarithm of a token's importance, against similarity (notebook 07 compares)
SPREAD = 1.0  # exponent of the schedule of merges over the layers, see planned (notebook 07 compares)


def stand_in(keys: Tensor, layout: Layout, patches: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Of each token [T]: its similarity (cosine of keys [T, d]) to its partner, and the row of that partner.

    Bipartite, as in ToMe: of the ``patches`` [T] of an image, which follow ``prefix`` other tokens, every second looks
    for the most similar one among those between. All other tokens have similarity -inf.
    """
    longest, images = layout.lengths[0], len(layout.lengths)
    place = torch.arange(len(keys), device=keys.device) - layout.starts[layout.segment]
    slot = layout.segment * longest + place
    keys = keys / _norm(keys).clamp(min=1e-12)[:, None]
    table = keys.new_zeros(images * longest, keys.shape[1]).index_copy(0, slot, keys)
    there = torch.zeros(images * longest, dtype=torch.bool, device=keys.device).index_fill(0, slot, True)
    table, there = table.view(images, longest, -1)[:, prefix:], there.view(images, longest)[:, prefix:]
    similarity = table[:, 1::2] @ table[:, ::2].transpose(1, 2)
    best = similarity.masked_fill(~there[:, None, ::2], -torch.inf).max(dim=2)
    if not best.values.shape[1]:  # in no image is a patch left that looks for a partner
        return torch.full_like(keys[:, 0], -torch.inf), layout.starts[layout.segment]
    asks = patches & ((place - prefix) % 2 == 1)
    found = layout.segment, ((place - prefix) // 2).clamp(0, best.values.shape[1] - 1)
    score = torch.where(asks, best.values[found], -torch.inf)
    return score, layout.starts[layout.segment] + prefix + 2 * best.indices[found]


def importance(qkv: Tensor, size: Tensor, layout: Layout, patches: Tensor) -> Tensor:
    """The logarithm of what the class token takes from each token [T], relative to the mean patch of its image.

    That is attention times norm of the value, mean over heads. The class token is the first of its image.
    """
    query, key, value = qkv.unbind(1)  # [T, heads, d]
    query = query[layout.starts].index_select(0, layout.segment)  # of the class token
    logits = torch.linalg.vecdot(query, key) / query.shape[-1] ** 0.5 + size.log()[:, None]  # as in attention
    images = (len(layout.lengths), logits.shape[1])
    segment = layout.segment[:, None].expand_as(logits)
    highest = logits.new_full(images, -torch.inf).scatter_reduce(0, segment, logits, "amax")
    weight = (logits - highest[layout.segment]).exp()
    attention = weight / weight.new_zeros(images).index_add(0, layout.segment, weight)[layout.segment]
    taken = (attention * _norm(value)).mean(dim=1)
    sums = taken.new_zeros(len(layout.lengths), 2)
    sums = sums.index_add(0, layout.segment, torch.stack([taken, torch.ones_like(taken)], dim=1) * patches[:, None])
    mean = sums[:, 0] / sums[:, 1].clamp(min=1)
    return (taken / mean[layout.segment]).log()


def _norm(vectors: Tensor) -> Tensor:
    """Euclidean norm over the last axis: of short vectors several times as fast as torch's on CPUs."""
    return torch.linalg.vecdot(vectors, vectors).sqrt()


@dataclass(frozen=True)
class Packed:
    """The tokens of a batch between two layers."""

    tokens: Tensor  # [T, D]
    size: Tensor  # [T] how many of the first tokens each stands for
    layout: Layout


def unmerged(tokens: Tensor) -> Packed:
    """Tokens [B, N, D] before any have merged."""
    images, count, _ = tokens.shape
    size = torch.ones_like(tokens[..., 0], dtype=torch.promote_types(tokens.dtype, torch.float32))
    return Packed(tokens.flatten(0, 1), size.flatten(), whole_layout(images, count, tokens.device))


def merged(packed: Packed, gone: Tensor, target: Tensor) -> Packed:
    """The tokens after the rows ``gone`` [m] have become part of the rows ``target`` [m]: means weighted by size."""
    keep = torch.ones_like(packed.layout.index, dtype=torch.bool).index_fill(0, gone, False)
    layout, stay = split_off(packed.layout, keep)
    if stay is None:
        return packed
    size = packed.size.index_add(0, target, packed.size[gone])
    # A mean is what it was plus what each that joins differs from it, by its share of the whole.
    change = (packed.tokens[gone] - packed.tokens[target]) * (packed.size[gone] / size[target])[:, None]
    tokens = packed.tokens.index_add(0, target, change.to(packed.tokens.dtype))
    return Packed(tokens.index_select(0, stay), size.index_select(0, stay), layout)


def feed_forward(block: nn.Module, packed: Packed) -> Packed:
    """The second half of timm's Block, the MLP."""
    return replace(packed, tokens=packed_mlp(block, packed.tokens, packed.layout))


def planned(model: VisionTransformer, count: int, saved: float, spread: float) -> list[float]:
    """How many tokens each layer merges, on average over images, to save about ``saved`` of the FLOPs.

    Layer l merges a share c (l + 1) ** ``spread`` of its remaining patches, at most half; the last layer merges none.
    """
    layers, prefix, whole = len(model.blocks), model.num_prefix_tokens, plain_flops(model, count)

    def share(scale: float) -> tuple[float, list[float]]:
        left, done, numbers = count, fixed_flops(model), []
        for layer in range(1, layers + 1):
            numbers.append(min(scale * (layer + 1) ** spread, 0.5) * (left - prefix) if layer < layers else 0.0)
            done += block_flops(model, left, left - numbers[-1], merges=layer < layers)
            left -= numbers[-1]
        return 1 - done / whole, numbers

    low, high = 0.0, 0.5
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle)[0] < saved else (low, middle)
    return share(high)[1]


@dataclass(frozen=True)
class MergingTrace:
    """How deep each token of a batch went before it became part of another."""

    depth: Tensor  # [B, N], integer, 1..L


class Adaptive(TokensLeave):
    """A VisionTransformer of timm's whose tokens merge where their score exceeds the threshold of their layer.

    State dict: the original's, ``thresholds`` [L] and ``importance_weight``; infinite thresholds
    leave the model as it was, bit for bit.
    """

    exact = ("thresholds", "importance_weight")
    added = exact
    original: type = VisionTransformer  # the class of the model that was made adaptive
    spread: float = SPREAD

    def compute_features(
        self, x: Tensor, attn_mask: Tensor | None, traced: bool, whole: bool
    ) -> tuple[Tensor, MergingTrace | None]:
        """The normalised tokens [B, N, D] of images [B, C, H, W], and the trace.

        A merged token is what stands for it. Unless ``traced`` or ``whole``, only those before the
        patches are there, if the head reads no other.
        """
        if not self._merges(x):
            layers, features = len(self.blocks), VisionTransformer.forward_features(self, x, attn_mask)
            return features, MergingTrace(torch.full(features.shape[:2], layers, device=x.device))
        self._check_followed(attn_mask)
        tokens = self.embed(x)
        packed, into, depth = self._layers(tokens)
        if not (traced or whole) and self.global_pool == "token":
            first = packed.layout.starts[packed.layout.images.argsort(), None]
            read = first + torch.arange(self.num_prefix_tokens, device=first.device)
            return self.norm(packed.tokens[read]), None
        features = self.norm(self._unpacked(packed, into)).view_as(tokens)
        return features, MergingTrace(depth.view(tokens.shape[:2]))

    def compute_layers(self, x: Tensor, attn_mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The normalised tokens [B, N, D] of images, and the tokens [B, N, D] after each layer."""
        tokens, layers = self.embed(x), []
        if not self._merges(x):
            for block in self.blocks:
                tokens = self.run(block, tokens, attn_mask)
                layers.append(tokens)
            return self.norm(tokens), layers
        self._check_followed(attn_mask)

        def observe(packed: Packed, into: Tensor) -> None:
            layers.append(self._unpacked(packed, into).view_as(tokens))

        self._layers(tokens, observe)
        return self.norm(layers[-1]), layers

    def prune_intermediate_layers(self, *args, **kwargs) -> list[int]:
        """As timm's."""
        taken = super().prune_intermediate_layers(*args, **kwargs)
        self.thresholds = self.thresholds[: len(self.blocks)]
        return taken

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _blank, (self.original,), self.__dict__.copy()

    @torch.no_grad()
    def calibrate(self, images: Tensor, saved: float, report: Callable = lambda _: None) -> None:
        """Set the thresholds so that ``saved`` of the FLOPs is saved on images [B, C, H, W], no label needed.

        ``report`` gets the share that is saved after each pass over the images, of which there are at most eight.
        Raises UserError for fewer than two images, images that are no numbers, or a share that is out of reach.
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            what = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise UserError(f"images are needed as one tensor of floats [B, C, H, W], normalised; this is {what}")
        if len(images) < 2:
            raise UserError(f"{len(images)} images are too few to set thresholds on; take some hundred")
        wanted = [self.patch_embed.proj.in_channels, *self.patch_embed.img_size]
        if list(images.shape[1:]) != wanted:
            raise UserError(f"images of shape {list(images.shape)}, the model wants [B, {str(wanted)[1:]}")
        if not images.isfinite().all():
            raise UserError("the images contain values that are no numbers (NaN or infinite); mend them")
        if not 0 <= saved <= MOST:
            raise UserError(f"a share of {saved} of the FLOPs cannot be saved; choose one between 0 and {MOST}")
        if saved == 0:
            self.thresholds.fill_(torch.inf)
            return
        training, before, wish, reached = self.training, self.thresholds.clone(), saved, False
        self.eval()
        try:
            for _ in range(8):
                found = self._set_thresholds(images, wish)
                report(found)
                reached = abs(found - saved) <= TOLERANCE
                if reached:
                    break
                wish = min(max(wish + saved - found, 0.0), 0.95)
        finally:
            self.train(training)
            if not reached:  # also after an interruption
                self.thresholds.copy_(before)
        if not reached:
            raise UserError(f"{saved:.0%} of the FLOPs are out of reach for this model: the last try saved {found:.0%}")

    def _merges(self, images: Tensor) -> bool:
        if is_exporting():
            raise UserError(
                "an adapted model merges other tokens in each image, which no exporter can follow; "
                "export the plain model, or an A-ViT"
            )
        return len(images) > 0 and bool(self.thresholds.isfinite().any())

    def _check_followed(self, attn_mask: Tensor | None) -> None:
        """Raise UserError where somebody counts on tokens in their places."""
        if attn_mask is not None:
            raise UserError("tokens that merge have no place in an attention mask; leave out attn_mask")
        parts = [part for block in self.blocks for part in (block, block.attn)]
        if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
            raise UserError(
                "a hook on a block would never be called, since tokens merge inside of it; "
                "use forward_intermediates, or a hook on its norms or MLP"
            )

    # The compiler has nothing to gain on lengths that differ in every batch.
    @torch.compiler.disable
    def _layers(
        self,
        tokens: Tensor,
        observe: Callable[[Packed, Tensor], None] = lambda packed, into: None,
    ) -> tuple[Packed, Tensor, Tensor]:
        """What is left of embedded tokens [B, N, D]; of each [B * N], which one it became part of and its depth.

        ``observe`` is told the first two after each layer.
        """
        batch, count, _ = tokens.shape
        into = torch.arange(batch * count, device=tokens.device)
        depth, packed = torch.full_like(into, len(self.blocks)), unmerged(tokens)
        for layer, (block, threshold) in enumerate(zip(self.blocks, self.thresholds.tolist(), strict=True), start=1):
            packed, qkv = self.run(self._attend, block, packed, count)
            if math.isfinite(threshold):
                score, partner = self._score(qkv, packed, count)
                merges, index = (score > threshold).nonzero()[:, 0], packed.layout.index
                into[index[merges]], depth[index[merges]] = index[partner[merges]], layer
                packed = merged(packed, merges, partner[merges])
            packed = self.run(feed_forward, block, packed)
            observe(packed, into)
        return packed, into, depth

    def _unpacked(self, packed: Packed, into: Tensor) -> Tensor:
        """The tokens [B * N, D] in their places, each merged one as what stands for it."""
        for _ in range(math.ceil(math.log2(len(self.blocks) + 1))):  # its partner may have merged later
            into = into[into]
        row = torch.empty_like(into)
        row[packed.layout.index] = torch.arange(len(packed.tokens), device=into.device)
        return packed.tokens[row[into]]

    def _attend(self, block: nn.Module, packed: Packed, count: int) -> tuple[Packed, Tensor]:
        """The tokens after attention, the first half of timm's Block; and queries, keys, values [T, 3, heads, d]."""
        # ToMe's proportional attention: a token counts as often as tokens are in it.
        bias = packed.size.log() if len(packed.tokens) < count * len(packed.layout.lengths) else None  # no size but 1
        tokens, qkv = packed_attending(block, packed.tokens, packed.layout, bias)
        return replace(packed, tokens=tokens), qkv

    def _score(self, qkv: Tensor, packed: Packed, count: int) -> tuple[Tensor, Tensor]:
        """The score [T] of each token (-inf: may not merge), and the row [T] that would stand for it."""
        layout, prefix = packed.layout, self.num_prefix_tokens
        patches = layout.index % count >= prefix
        # Heads are summed: the cosine of their mean is the same.
        score, partner = stand_in(sum(qkv[:, 1].unbind(1)), layout, patches, prefix)
        if self.cls_token is not None and self.importance_weight:
            score = score - self.importance_weight * importance(qkv, packed.size, layout, patches)
        return score, partner

    def _set_thresholds(self, images: Tensor, wish: float) -> float:
        """Set the thresholds by which about ``wish`` of the FLOPs is saved on images; returns the share really saved.

        In each layer as many tokens merge, over all images together, as ``planned`` says.
        """
        states = [unmerged(self.embed(part)) for part in images.split(64)]
        count = len(states[0].tokens) // len(states[0].layout.lengths)
        done, self.thresholds[:] = fixed_flops(self), torch.inf
        for layer, number in enumerate(planned(self, count, wish, self.spread)):
            block, before = self.blocks[layer], torch.cat([state.layout.counts for state in states]).double()
            states, seen = zip(*(self._attend(block, state, count) for state in states), strict=True)
            if number > 0:
                found = [self._score(qkv, state, count) for qkv, state in zip(seen, states, strict=True)]
                threshold = _edge(torch.cat([score for score, _ in found]), round(number * len(images)))
                self.thresholds[layer] = threshold
                chosen = [(score > threshold).nonzero()[:, 0] for score, _ in found]
                pairs = zip(states, chosen, found, strict=True)
                states = [merged(state, gone, partner[gone]) for state, gone, (_, partner) in pairs]
            states = [feed_forward(block, state) for state in states]
            after = torch.cat([state.layout.counts for state in states]).double()
            done += block_flops(self, before, after, bool(self.thresholds[layer].isfinite())).mean().item()
        return 1 - done / plain_flops(self, count)


def _edge(scores: Tensor, wanted: int) -> float:
    """The threshold that ``wanted`` of the finite scores exceed: halfway to the next lower score, if there is one."""
    ranked = scores[scores.isfinite()].sort(descending=True).values
    if not (wanted := min(wanted, len(ranked))):
        return math.inf
    return ranked[wanted - 1 : wanted + 1].mean().item() if wanted < len(ranked) else ranked[-1].item() - 1


def adapt(
    model: VisionTransformer, images: Tensor, saved: float, importance_weight: float = IMPORTANCE_WEIGHT,
    report: Callable[[float], None] = lambda _: None,
) -> Adaptive:  # fmt: skip
    """A copy of a trained ``model`` of timm's that saves about ``saved`` of its FLOPs; nothing is trained.

    ``images`` [B, C, H, W], some hundred without labels, are as the model expects them; thresholds are set on them.
    Raises UserError for a model that cannot be adapted, and as ``Adaptive.calibrate`` does.
    """
    adaptive = without_thresholds(model, importance_weight)
    if not all(weights.isfinite().all() for weights in model.state_dict().values()):
        raise UserError("the model has weights that are no numbers (NaN or infinite); load it again")
    adaptive.calibrate(images, saved, report)
    return adaptive


def without_thresholds(model: VisionTransformer, importance_weight: float = IMPORTANCE_WEIGHT) -> Adaptive:
    """A copy of ``model`` whose thresholds are infinite, for a state dict to be loaded into; raises UserError."""
    if reason := why_not(model):
        raise UserError(f"{type(model).__name__} cannot be adapted: {reason}")
    adaptive = deepcopy(model)
    adaptive.__class__ = adaptive_class(type(model))
    device = model.patch_embed.proj.weight.device
    adaptive.register_buffer("thresholds", torch.full((len(model.blocks),), torch.inf, device=device))
    adaptive.register_buffer("importance_weight", torch.tensor(importance_weight, device=device))
    return adaptive


@cache
def adaptive_class(original: type) -> type:
    """The class of adaptive models of a class of timm's."""
    if original is VisionTransformer:
        return Adaptive
    return type(f"Adaptive{original.__name__}", (Adaptive, original), {"original": original})


def _blank(original: type) -> Adaptive:
    """An adaptive model without content, for pickle to fill."""
    kind = adaptive_class(original)
    return kind.__new__(kind)


def why_not(model: nn.Module) -> str:
    """Why ``model`` cannot be adapted, in words; empty if it can."""
    if not isinstance(model, VisionTransformer):
        return "it is no VisionTransformer of timm's"
    if isinstance(model, Adaptive):
        return "it is adaptive already; use its calibrate"
    own = [getattr(type(model), name) is getattr(VisionTransformer, name) for name in ("forward", "forward_features")]
    if not all(own):
        return "it runs its blocks in a way of its own"
    if reason := why_not_plain(model):
        return reason
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters()):
        return "it is in half precision; convert it by model.float()"
    return "" if isinstance(model.patch_drop, nn.Identity | None) else "it drops patches at random"
