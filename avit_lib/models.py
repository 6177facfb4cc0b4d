"""A-ViT on timm's VisionTransformer, registered with timm as ``avit_*``.

``AViT`` adds no parameter: it accepts the state dict of a DeiT or ViT of the same shape unchanged.
"""

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from avit_lib.config import StudyError
from avit_lib.halting import (
    HaltingRule,
    HaltingTrace,
    fuse,
    halting_score,
    halting_step,
    initial_state,
    join,
    most_similar,
)
from avit_lib.packed import predict_packed, run_packed


class AViT(VisionTransformer):
    """VisionTransformer whose tokens halt by themselves (A-ViT, section 3).

    Modifications: ``forward_features`` runs the blocks with halting and returns the representation [B, 1, D], the
    output-weighted sum of the class token over the layers; ``forward_with_trace`` returns the trace as well. How it
    computes is a setting, not a different model: ``execution`` is "masked" (halted tokens are computed and ignored, as
    published), "packed" (they are gone) or "auto" (packed in evaluation, masked in training).
    """

    def __init__(
        self, *args, gamma: float = 5.0, beta: float = -10.0, eps: float = 0.01,
        class_token_halts: bool = True, fuse_halted: bool = False, merge_halted: bool = False, **kwargs,
    ):  # fmt: skip
        """gamma and beta scale and shift channel 0 into a halting score; a token halts at a sum of 1 - eps.

        Variants that go past the paper: ``class_token_halts=False`` lets the class token run to the last layer; halted
        tokens live on, with ``fuse_halted=True`` in one summary token an image, with ``merge_halted=True`` each in the
        most similar patch that goes on.
        """
        refused = [name for name in ("class_token", "global_pool") if kwargs.get(name, "token") not in (True, "token")]
        refused += [name for name in ("reg_tokens", "patch_drop_rate") if kwargs.get(name)]
        if refused:
            raise StudyError(f"A-ViT reads its class token and follows every patch; leave out {', '.join(refused)}")
        if fuse_halted and merge_halted:
            raise StudyError("halted tokens are either fused or merged; leave out fuse_halted or merge_halted")
        super().__init__(*args, **kwargs)
        self.gamma, self.beta, self.eps = gamma, beta, eps
        self.class_token_halts, self.fuse_halted, self.merge_halted = class_token_halts, fuse_halted, merge_halted
        self.execution = "auto"

    @property
    def rule(self) -> HaltingRule:
        """When a token halts, and what becomes of it."""
        variant = (self.class_token_halts, self.fuse_halted, self.merge_halted)
        return HaltingRule(self.gamma, self.beta, self.eps, *variant)

    def forward_with_trace(self, images: Tensor) -> tuple[Tensor, HaltingTrace]:
        """Logits [B, K] of images [B, C, H, W] and the trace of every token to its own halting."""
        run = run_packed if self._packs() else run_masked
        representation, trace = run(self.blocks, self.embed(images), self.rule)
        return self.forward_head(self.norm(representation)), trace

    def forward_features(self, images: Tensor) -> Tensor:
        """The normalised representation [B, 1, D] of images [B, C, H, W]."""
        tokens = self.embed(images)
        if self._packs():
            return self.norm(predict_packed(self.blocks, tokens, self.rule))
        return self.norm(run_masked(self.blocks, tokens, self.rule)[0])

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        return self.forward_head(self.forward_features(images))

    def embed(self, images: Tensor) -> Tensor:
        """The tokens [B, N, D] that enter the first layer, class token first, of images [B, C, H, W]."""
        return self.norm_pre(self._pos_embed(self.patch_embed(images)))

    def _packs(self) -> bool:
        if self.execution not in ("masked", "packed", "auto"):
            raise StudyError(f"unknown execution {self.execution!r}; choose from masked, packed, auto")
        return self.execution == "packed" or (self.execution == "auto" and not self.training)


def run_masked(blocks: torch.nn.Sequential, tokens: Tensor, rule: HaltingRule) -> tuple[Tensor, HaltingTrace]:
    """Algorithm 1 with masks, as published: halted tokens are computed on and ignored.

    From the embedded tokens [B, N, D] to the representation [B, 1, D] before the final norm, and the trace.
    """
    state = initial_state(halting_score(tokens, rule.gamma, rule.beta))
    summary, fused = torch.zeros_like(tokens[:, :1]), state.cumulative.new_zeros(len(tokens), 1, 1)
    size = torch.ones_like(state.cumulative) if rule.merge_halted else None  # how many tokens each stands for
    representation = 0.0
    scores, weights = [], []
    for layer, block in enumerate(blocks, start=1):
        active = state.active
        tokens = tokens * active[..., None]  # t * m
        if rule.fuse_halted:
            tokens, summary = _block_with_summary(block, tokens, active, summary, fused)
        else:
            tokens = masked_block(block, tokens, active, size)
        score = halting_score(tokens, rule.gamma, rule.beta)  # h
        if layer == len(blocks):
            score = torch.ones_like(score)  # whoever comes this far halts here
        elif not rule.class_token_halts:
            score = torch.cat([torch.zeros_like(score[:, :1]), score[:, 1:]], dim=1)
        state, weight = halting_step(state, score, rule.eps)
        if rule.fuse_halted:
            halts = (active & ~state.active)[..., None]
            total, number = (tokens * halts).sum(dim=1, keepdim=True), halts.sum(dim=1, keepdim=True)
            summary, fused = fuse(summary, fused, total, number)
        class_weight = weight[:, :1]  # w of the class token
        representation = representation + class_weight[..., None] * tokens[:, :1]
        if rule.merge_halted and layer < len(blocks):
            tokens, size = merge_masked(tokens, size, active & ~state.active, state.active)
        scores.append(torch.where(active, score, 0.0))
        weights.append(class_weight)
    trace = HaltingTrace(state.depth, state.ponder, torch.stack(scores, dim=1), torch.cat(weights, dim=1))
    return representation.to(tokens.dtype), trace


def merge_masked(tokens: Tensor, size: Tensor, halts: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Let each token [B, N, D] that ``halts`` join the most similar active patch of its image, if there is one."""
    images, count, width = tokens.shape
    takers = F.pad(active[:, 1:], (1, 0))  # not the class token
    into = most_similar(tokens, tokens, takers) + count * torch.arange(images, device=tokens.device)[:, None]
    weight = torch.where(halts & takers.any(dim=1, keepdim=True), size, 0.0)
    flat = tokens.flatten(0, 1)
    merged, size = join(flat, size.flatten(), flat, weight.flatten(), into.flatten())
    return merged.view(images, count, width), size.view(images, count)


def masked_block(block: torch.nn.Module, tokens: Tensor, active: Tensor, size: Tensor | None) -> Tensor:
    """A block on tokens [B, N, D] of which only the ``active`` [B, N] are attended.

    Each counts in attention as ``size`` [B, N] of them would; None: as one.
    """
    # An image without active tokens may attend anywhere: a row of keys all masked would give NaN.
    keys = active | ~active.any(dim=1, keepdim=True)
    mask = keys if size is None else torch.where(keys, size, 0.0).log().to(tokens.dtype)
    return block(tokens, attn_mask=mask[:, None, None, :])


def _block_with_summary(
    block: torch.nn.Module, tokens: Tensor, active: Tensor, summary: Tensor, fused: Tensor
) -> tuple[Tensor, Tensor]:
    """A block on the active tokens [B, N, D] and the summary [B, 1, D] of ``fused`` [B, 1, 1] halted ones."""
    tokens = torch.cat([tokens, summary.to(tokens.dtype)], dim=1)
    bias = torch.cat([active, fused[..., 0]], dim=1).log()  # of an active token log 1 = 0, of a halted one -inf
    tokens = block(tokens, attn_mask=bias[:, None, None, :].to(tokens.dtype))
    return tokens[:, :-1], tokens[:, -1:]


def _cfg(**overrides) -> dict:
    imagenet = dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        crop_pct=0.9,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.proj",
        classifier="head",
        license="apache-2.0",
    )
    return imagenet | overrides


_FASHION = dict(num_classes=10, input_size=(1, 28, 28), crop_pct=1.0, mean=(0.286,), std=(0.353,))

default_cfgs = generate_default_cfgs(
    {
        "avit_tiny_patch16_224.fb_in1k": _cfg(hf_hub_id="timm/deit_tiny_patch16_224.fb_in1k"),
        "avit_small_patch16_224.fb_in1k": _cfg(hf_hub_id="timm/deit_small_patch16_224.fb_in1k"),
        "avit_base_patch16_224.fb_in1k": _cfg(hf_hub_id="timm/deit_base_patch16_224.fb_in1k"),
        **{f"{kind}_{size}.untrained": _cfg(**_FASHION)
           for kind in ("deit", "avit") for size in ("micro_patch4_28", "nano_patch7_28")},
    }
)  # fmt: skip


def _create(name: str, model_class: type, pretrained: bool, **kwargs) -> VisionTransformer:
    return build_model_with_cfg(model_class, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


def _create_small(name: str, model_class: type, pretrained: bool, **kwargs) -> VisionTransformer:
    """A model that is trained from random weights: learnt positions start as sines and cosines, which saves epochs."""
    model = _create(name, model_class, pretrained, **kwargs)
    sines = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), model.embed_dim)
    with torch.no_grad():
        model.pos_embed[0, model.num_prefix_tokens :] = sines
    return model


_TINY = dict(patch_size=16, embed_dim=192, depth=12, num_heads=3)
_SMALL = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6)
_BASE = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12)
# Narrow backbones for 28 x 28 grey images.
_MICRO = dict(
    img_size=28, in_chans=1, num_classes=10, patch_size=4, embed_dim=64, depth=12, num_heads=2, mlp_ratio=2.0
)  # fmt: skip
_NANO = _MICRO | dict(patch_size=7, embed_dim=16, depth=4)


@register_model
def avit_tiny_patch16_224(pretrained: bool = False, **kwargs) -> AViT:
    """A-ViT-T: the shape, and the pretrained weights, of DeiT-T."""
    return _create("avit_tiny_patch16_224", AViT, pretrained, **(_TINY | kwargs))


@register_model
def avit_small_patch16_224(pretrained: bool = False, **kwargs) -> AViT:
    """A-ViT-S: the shape, and the pretrained weights, of DeiT-S."""
    return _create("avit_small_patch16_224", AViT, pretrained, **(_SMALL | kwargs))


@register_model
def avit_base_patch16_224(pretrained: bool = False, **kwargs) -> AViT:
    """A-ViT-B: the shape, and the pretrained weights, of DeiT-B."""
    return _create("avit_base_patch16_224", AViT, pretrained, **(_BASE | kwargs))


@register_model
def avit_micro_patch4_28(pretrained: bool = False, **kwargs) -> AViT:
    """A-ViT for 28 x 28 grey images: 49 patches, 64 channels, 12 layers."""
    return _create_small("avit_micro_patch4_28", AViT, pretrained, **(_MICRO | kwargs))


@register_model
def deit_micro_patch4_28(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """The plain transformer of ``avit_micro_patch4_28``."""
    return _create_small("deit_micro_patch4_28", VisionTransformer, pretrained, **(_MICRO | kwargs))


@register_model
def avit_nano_patch7_28(pretrained: bool = False, **kwargs) -> AViT:
    """A-ViT for tests: 16 patches, 16 channels, 4 layers."""
    return _create_small("avit_nano_patch7_28", AViT, pretrained, **(_NANO | kwargs))


@register_model
def deit_nano_patch7_28(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """The plain transformer of ``avit_nano_patch7_28``."""
    return _create_small("deit_nano_patch7_28", VisionTransformer, pretrained, **(_NANO | kwargs))
