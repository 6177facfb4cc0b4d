"""Any VisionTransformer of timm's, made adaptive without training: ``adapt``, and its model.

The model's tokens merge layer by layer as ``merging`` says. Its thresholds are set on a few hundred
images, without labels, for a wanted share of FLOPs saved.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from avit_lib.backbone import (
    TokensLeave,
    check_followed,
    check_images,
    evaluating,
    is_exporting,
    is_hooked,
    why_not_plain,
)
from avit_lib.errors import UserError
from avit_lib.flops import MergingTrace, flops_of_depth, plain_flops
from avit_lib.merging import (
    IMPORTANCE_WEIGHT,
    SPREAD,
    STEP,
    Candidates,
    Packed,
    feed_forward,
    merge,
    pack,
    plan,
    score_tokens,
    unpack,
)
from avit_lib.packed import packed_attention, to_dense

TOLERANCE = 0.005  # share of FLOPs by which a calibration may miss the wish
MOST = 0.8  # share of FLOPs that may be asked for
# The threshold of a layer in which no token merges: no score comes near it. Finite, so that an
# average of weights (EMA) keeps it
NEVER = 1e6


class Adaptive(TokensLeave):
    """A VisionTransformer whose tokens merge where their score exceeds their layer's threshold.

    State dict: the original's, ``thresholds`` [L] and ``importance_weight``; with all thresholds at
    ``NEVER`` the model is as it was, bit for bit.
    """

    added = ("thresholds", "importance_weight")
    spread: float = SPREAD
    step: int = STEP

    def compute_features(
        self, x: Tensor, traced: bool, observe: Callable | None = None
    ) -> tuple[Tensor, MergingTrace]:
        """The normalised tokens [B, N, D] of images [B, C, H, W], and the trace.

        A token that merged has the features of the one that stands for it.
        """
        tokens = self.embed(x)
        if self._merges(x):
            check_followed(self)
            packed = self._compute(tokens, observe)
            features = unpack(packed, packed.tokens).view_as(tokens)
            return self.norm(features), MergingTrace(packed.depth.view(tokens.shape[:2]))
        for block in self.blocks:
            tokens = self.run(block, tokens)
            if observe:
                observe(tokens)
        depth = torch.full(tokens.shape[:2], len(self.blocks), device=x.device)
        return self.norm(tokens), MergingTrace(depth)

    def flops_of(self, trace: MergingTrace) -> Tensor:
        """FLOPs [B] of inference on the images traced."""
        return flops_of_depth(self, trace.depth, self.merging_layers())

    def merging_layers(self) -> list[bool]:
        """Whether tokens merge in each layer; in the last they don't, whatever its threshold."""
        return [*map(can_merge, self.thresholds.tolist()[:-1]), False]

    def prune_intermediate_layers(self, *args, **kwargs) -> list[int]:
        """As timm's; tokens that merged in the layer that is now the last don't any more."""
        taken = super().prune_intermediate_layers(*args, **kwargs)
        self.thresholds = self.thresholds[: len(self.blocks)]
        return taken

    @torch.no_grad()
    def calibrate(self, images: Tensor, saved: float, report: Callable = lambda _: None) -> None:
        """Set the thresholds so that ``saved`` of the FLOPs is saved on images [B, C, H, W].

        No label is needed. ``report`` gets the share that is saved after each pass over the images,
        of which there are at most eight. Raises UserError for fewer than two images, images that
        are no numbers, or a share that is out of reach.
        """
        check_images(images, least=2)
        if not 0 <= saved <= MOST:
            raise UserError(
                f"a share of {saved} of the FLOPs cannot be saved; choose one between 0 and {MOST}"
            )
        wish = saved
        for _ in range(8):
            with evaluating(self):
                thresholds, found = self._find_thresholds(images, wish)
            report(found)
            if abs(found - saved) <= TOLERANCE:
                self.thresholds = thresholds
                return
            wish = min(max(wish + saved - found, 0.0), 0.95)
        raise UserError(
            f"{saved:.0%} of the FLOPs are out of reach for this model: "
            f"the last try saved {found:.0%}"
        )

    def _merges(self, images: Tensor) -> bool:
        if is_exporting():
            raise UserError(
                "an adapted model merges other tokens in each image, which no exporter can follow; "
                "export the plain model, or an A-ViT"
            )
        if len(self.thresholds) != len(self.blocks):
            raise UserError(
                f"{len(self.thresholds)} thresholds do not fit {len(self.blocks)} layers; take "
                f"layers out by prune_intermediate_layers, or before adapt"
            )
        return len(images) > 0 and any(self.merging_layers())

    # The compiler has nothing to gain on lengths that differ in every batch.
    @torch.compiler.disable
    def _compute(self, tokens: Tensor, observe: Callable | None) -> Packed:
        """What is left of tokens [B, N, D] after all layers; ``observe`` is told after each."""
        packed = pack(tokens, len(self.blocks))
        layers = zip(self.blocks, self.thresholds.tolist(), self.merging_layers(), strict=True)
        for layer, (block, threshold, merges) in enumerate(layers, start=1):
            packed, found = self.run(self._attend, block, packed, merges)
            if merges:
                packed = merge(packed, found, threshold, layer)
            packed = self.run(feed_forward, block, packed)
            if observe:
                observe(unpack(packed, packed.tokens).view_as(tokens))
        return packed

    def _attend(
        self, block: nn.Module, packed: Packed, merges: bool
    ) -> tuple[Packed, list[Candidates]]:
        """Tokens after attention; if it ``merges``, who may merge."""
        layout, prefix = packed.layout, self.num_prefix_tokens
        # ToMe's proportional attention: a token counts as often as tokens are in it.
        log_size = packed.size.log()
        bias = log_size if len(packed.size) < len(packed.into) else None
        tokens, qkv = packed_attention(block, packed.tokens, layout, bias)
        packed = replace(packed, tokens=tokens)
        if not merges:
            return packed, []
        weight = self.importance_weight.item() if self.cls_token is not None else 0.0
        found = []
        for table, sizes in zip(to_dense(qkv, layout), to_dense(log_size, layout), strict=True):
            query, key, value = table.permute(2, 0, 3, 1, 4)  # [images, heads, length, d]
            found.append(score_tokens(query, key, value, sizes, prefix, weight))
        return packed, found

    def _find_thresholds(self, images: Tensor, wish: float) -> tuple[list[float], float]:
        """Thresholds that save about ``wish`` of the FLOPs, and the share that they really save.

        In each layer as many tokens merge, over all images together, as ``plan`` says.
        """
        parts = [pack(self.embed(part), len(self.blocks)) for part in images.split(64)]
        count = parts[0].layout.lengths[0]
        thresholds = []
        numbers = plan(self, count, wish, self.spread, self.step)
        for layer, number in enumerate(numbers, start=1):
            block = self.blocks[layer - 1]
            attended = [self._attend(block, part, number > 0) for part in parts]
            parts, threshold = [part for part, _ in attended], NEVER
            if number:
                scores = torch.cat([one.score.flatten() for _, found in attended for one in found])
                wanted = number + (parts[0].grain - 1) / 2  # ``choose`` leaves out some
                threshold = _find_threshold(scores, round(wanted * len(images)))
                parts = [merge(part, found, threshold, layer) for part, found in attended]
            parts = [feed_forward(block, part) for part in parts]
            thresholds.append(threshold)
        depth = torch.cat([part.depth for part in parts]).view(-1, count)
        done = flops_of_depth(self, depth, [*map(can_merge, thresholds)])
        return thresholds, 1 - done.mean().item() / plain_flops(self, count)


class AdaptiveDistilled(Adaptive, VisionTransformerDistilled):
    """The same of a distilled DeiT, which has two heads."""


KINDS = {VisionTransformer: Adaptive, VisionTransformerDistilled: AdaptiveDistilled}


def can_merge(threshold: float) -> bool:
    """Whether tokens merge in a layer of this threshold; infinity means ``NEVER``, too."""
    return threshold < NEVER / 2  # half: an average of equal numbers is rounded


def _find_threshold(scores: Tensor, wanted: int) -> float:
    """The threshold that ``wanted`` of the finite scores exceed: halfway to the next lower."""
    ranked = scores[scores.isfinite()].sort(descending=True).values
    wanted = min(wanted, len(ranked))
    if not wanted:
        return NEVER
    if wanted == len(ranked):
        return ranked[-1].item() - 1
    return ranked[wanted - 1 : wanted + 1].mean().item()


def adapt(
    model: VisionTransformer,
    images: Tensor,
    saved: float,
    importance_weight: float = IMPORTANCE_WEIGHT,
    report: Callable[[float], None] = lambda _: None,
) -> Adaptive:
    """A copy of a trained ``model`` of timm's that saves about ``saved`` of its FLOPs.

    Nothing is trained. ``images`` [B, C, H, W], some hundred without labels, are as the model
    expects them; thresholds are set on them. Raises UserError for a model that cannot be adapted,
    and as ``Adaptive.calibrate`` does.
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
    """A copy of ``model`` in which no token merges, for a state dict to be loaded into.

    Raises UserError for a model that cannot be adapted.
    """
    if reason := why_not(model):
        raise UserError(f"{type(model).__name__} cannot be adapted: {reason}")
    adaptive = deepcopy(model)
    adaptive.__class__ = KINDS[type(model)]
    device = model.patch_embed.proj.weight.device
    thresholds = [NEVER] * len(model.blocks)
    for name, value in (("thresholds", thresholds), ("importance_weight", importance_weight)):
        adaptive.register_buffer(name, torch.zeros((), device=device))
        setattr(adaptive, name, value)
    return adaptive


def why_not(model: nn.Module) -> str:
    """Why ``model`` cannot be adapted, in words; empty if it can."""
    if type(model) not in KINDS:
        return "it is no plain VisionTransformer of timm's"
    if {"forward", "forward_features", "forward_head"} & vars(model).keys():
        return (
            "its forward was replaced, by torch.compile(model.forward) say; adapt the model first"
        )
    if is_hooked(model):
        return "it has hooks, which its calibration would pass by; adapt the model first"
    if reason := why_not_plain(model):
        return reason
    if any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters()):
        return "it is in half precision; convert it by model.float()"
    return ""
