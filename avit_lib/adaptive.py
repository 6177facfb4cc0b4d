"""Any VisionTransformer of timm's, made adaptive without training: ``adapt``, and the model that it
gives.

The model's tokens merge layer by layer as ``merging`` says. Its thresholds are set on a few hundred
images, without labels, for a wanted share of FLOPs saved.
"""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avit_lib.backbone import TokensLeave, check_images, is_exporting, is_hooked, why_not_plain
from avit_lib.errors import UserError
from avit_lib.flops import block_flops, fixed_flops, plain_flops
from avit_lib.merging import (
    IMPORTANCE_WEIGHT,
    SPREAD,
    Packed,
    feed_forward,
    importance,
    merged,
    planned,
    stand_in,
    unmerged,
)
from avit_lib.packed import packed_attending

TOLERANCE = 0.005  # share of FLOPs by which a calibration may miss the wish
MOST = 0.8  # share of FLOPs that may be asked for


@dataclass(frozen=True)
class MergingTrace:
    """How deep each token of a batch went before it became part of another."""

    depth: Tensor  # [B, N], integer, 1..L


class Adaptive(TokensLeave):
    """A VisionTransformer of timm's whose tokens merge where their score exceeds the threshold of
    their layer.

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
            layers, features = (
                len(self.blocks),
                VisionTransformer.forward_features(self, x, attn_mask),
            )
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
        return _blank, (self.original,), self.__getstate__()

    @torch.no_grad()
    def calibrate(self, images: Tensor, saved: float, report: Callable = lambda _: None) -> None:
        """Set the thresholds so that ``saved`` of the FLOPs is saved on images [B, C, H, W], no
        label needed.

        ``report`` gets the share that is saved after each pass over the images, of which there are
        at most eight. Raises UserError for fewer than two images, images that are no numbers, or a
        share that is out of reach.
        """
        check_images(images)
        if len(images) < 2:
            raise UserError(
                f"{len(images)} images are too few to set thresholds on; take some hundred"
            )
        wanted = [self.patch_embed.proj.in_channels, *self.patch_embed.img_size]
        if list(images.shape[1:]) != wanted:
            raise UserError(
                f"images of shape {list(images.shape)}, the model wants [B, {str(wanted)[1:]}"
            )
        if not 0 <= saved <= MOST:
            raise UserError(
                f"a share of {saved} of the FLOPs cannot be saved; choose one between 0 and {MOST}"
            )
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
            raise UserError(
                f"{saved:.0%} of the FLOPs are out of reach for this model: the last try saved {found:.0%}"
            )

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
            raise UserError(
                "tokens that merge have no place in an attention mask; leave out attn_mask"
            )
        if reason := why_not_plain(self):
            raise UserError(f"tokens can't merge any more: {reason}")
        parts = [self.blocks]
        for block in self.blocks:
            attention = block.attn
            parts += [block, attention, attention.attn_drop, attention.q_norm, attention.k_norm]
            parts += [block.drop_path1, block.drop_path2]
        if any(is_hooked(part) for part in parts):
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
        """What is left of embedded tokens [B, N, D]; of each [B * N], which one it became part of
        and its depth.

        ``observe`` is told the first two after each layer.
        """
        batch, count, _ = tokens.shape
        into = torch.arange(batch * count, device=tokens.device)
        depth, packed = torch.full_like(into, len(self.blocks)), unmerged(tokens)
        for layer, (block, threshold) in enumerate(
            zip(self.blocks, self.thresholds.tolist(), strict=True), start=1
        ):
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
        for _ in range(
            math.ceil(math.log2(len(self.blocks) + 1))
        ):  # its partner may have merged later
            into = into[into]
        row = torch.empty_like(into)
        row[packed.layout.index] = torch.arange(len(packed.tokens), device=into.device)
        return packed.tokens[row[into]]

    def _attend(self, block: nn.Module, packed: Packed, count: int) -> tuple[Packed, Tensor]:
        """The tokens after attention, the first half of timm's Block; and queries, keys, values [T,
        3, heads, d].
        """
        # ToMe's proportional attention: a token counts as often as tokens are in it.
        bias = (
            packed.size.log() if len(packed.tokens) < count * len(packed.layout.lengths) else None
        )  # no size but 1
        tokens, qkv = packed_attending(block, packed.tokens, packed.layout, bias)
        return replace(packed, tokens=tokens), qkv

    def _score(self, qkv: Tensor, packed: Packed, count: int) -> tuple[Tensor, Tensor]:
        """The score [T] of each token (-inf: may not merge), and the row [T] that would stand for
        it.
        """
        layout, prefix = packed.layout, self.num_prefix_tokens
        patches = layout.index % count >= prefix
        # Heads are summed: the cosine of their mean is the same.
        score, partner = stand_in(sum(qkv[:, 1].unbind(1)), layout, patches, prefix)
        if self.cls_token is not None and self.importance_weight:
            score = score - self.importance_weight * importance(qkv, packed.size, layout, patches)
        return score, partner

    def _set_thresholds(self, images: Tensor, wish: float) -> float:
        """Set the thresholds by which about ``wish`` of the FLOPs is saved on images; returns the
        share really saved.

        In each layer as many tokens merge, over all images together, as ``planned`` says.
        """
        states = [unmerged(self.embed(part)) for part in images.split(64)]
        count = len(states[0].tokens) // len(states[0].layout.lengths)
        done, self.thresholds[:] = fixed_flops(self), torch.inf
        for layer, number in enumerate(planned(self, count, wish, self.spread)):
            block, before = (
                self.blocks[layer],
                torch.cat([state.layout.counts for state in states]).double(),
            )
            states, seen = zip(
                *(self._attend(block, state, count) for state in states), strict=True
            )
            if number > 0:
                found = [
                    self._score(qkv, state, count) for qkv, state in zip(seen, states, strict=True)
                ]
                threshold = _edge(
                    torch.cat([score for score, _ in found]), round(number * len(images))
                )
                self.thresholds[layer] = threshold
                chosen = [(score > threshold).nonzero()[:, 0] for score, _ in found]
                pairs = zip(states, chosen, found, strict=True)
                states = [merged(state, gone, partner[gone]) for state, gone, (_, partner) in pairs]
            states = [feed_forward(block, state) for state in states]
            after = torch.cat([state.layout.counts for state in states]).double()
            done += (
                block_flops(self, before, after, bool(self.thresholds[layer].isfinite()))
                .mean()
                .item()
            )
        return 1 - done / plain_flops(self, count)


def _edge(scores: Tensor, wanted: int) -> float:
    """The threshold that ``wanted`` of the finite scores exceed: halfway to the next lower score,
    if there is one.
    """
    ranked = scores[scores.isfinite()].sort(descending=True).values
    if not (wanted := min(wanted, len(ranked))):
        return math.inf
    return (
        ranked[wanted - 1 : wanted + 1].mean().item()
        if wanted < len(ranked)
        else ranked[-1].item() - 1
    )


def adapt(
    model: VisionTransformer,
    images: Tensor,
    saved: float,
    importance_weight: float = IMPORTANCE_WEIGHT,
    report: Callable[[float], None] = lambda _: None,
) -> Adaptive:
    """A copy of a trained ``model`` of timm's that saves about ``saved`` of its FLOPs; nothing is
    trained.

    ``images`` [B, C, H, W], some hundred without labels, are as the model expects them; thresholds
    are set on them. Raises UserError for a model that cannot be adapted, and as
    ``Adaptive.calibrate`` does.
    """
    adaptive = without_thresholds(model, importance_weight)
    if not all(weights.isfinite().all() for weights in model.state_dict().values()):
        raise UserError(
            "the model has weights that are no numbers (NaN or infinite); load it again"
        )
    adaptive.calibrate(images, saved, report)
    return adaptive


def without_thresholds(
    model: VisionTransformer, importance_weight: float = IMPORTANCE_WEIGHT
) -> Adaptive:
    """A copy of ``model`` whose thresholds are infinite, for a state dict to be loaded into; raises
    UserError.
    """
    if reason := why_not(model):
        raise UserError(f"{type(model).__name__} cannot be adapted: {reason}")
    adaptive = deepcopy(model)
    adaptive.__class__ = adaptive_class(type(model))
    device = model.patch_embed.proj.weight.device
    adaptive.register_buffer(
        "thresholds", torch.full((len(model.blocks),), torch.inf, device=device)
    )
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
    if {"forward", "forward_features"} & vars(model).keys():
        return (
            "its forward was replaced, by torch.compile(model.forward) say; adapt the model first"
        )
    own = [
        getattr(type(model), name) is getattr(VisionTransformer, name)
        for name in ("forward", "forward_features")
    ]
    if not all(own):
        return "it runs its blocks in a way of its own"
    if reason := why_not_plain(model):
        return reason
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters()):
        return "it is in half precision; convert it by model.float()"
    return "" if isinstance(model.patch_drop, nn.Identity | None) else "it drops patches at random"
