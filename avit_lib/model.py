"""A-ViT on timm's VisionTransformer, registered with timm as ``avit_*``; no parameter more than a DeiT or ViT."""

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from avit_lib.errors import UserError
from avit_lib.halting import HaltingRule, HaltingTrace, halting_score, halting_step, initial_state
from avit_lib.packed import predict_packed, run_packed


class AViT(VisionTransformer):
    """VisionTransformer whose tokens halt by themselves (A-ViT, section 3).

    The representation [B, 1, D] is the output-weighted sum of the class token over the layers. How it is computed is a
    setting, not a different model: ``execution`` is "masked" (halted tokens are computed and ignored, as published),
    "packed" (they are gone) or "auto" (packed in evaluation, masked in training).
    """

    def __init__(
        self, *args, gamma: float = 5.0, beta: float = -10.0, eps: float = 0.01,
        class_token_halts: bool = True, projection: bool = False, **kwargs,
    ):  # fmt: skip
        """The halting settings are those of ``HaltingRule``, the others timm's; raises UserError for what won't go."""
        needed = {"class_token": True, "global_pool": "token", "reg_tokens": 0, "patch_drop_rate": 0}
        refused = [name for name, value in needed.items() if kwargs.get(name, value) != value]
        if refused:
            raise UserError(f"A-ViT reads its class token and follows every patch; leave out {', '.join(refused)}")
        super().__init__(*args, **kwargs)
        self.gamma, self.beta, self.eps, self.class_token_halts = gamma, beta, eps, class_token_halts
        self.execution = "auto"
        # A learned projection adds D parameters; it starts as what it replaces, channel 0.
        self.direction = nn.Parameter(torch.eye(self.embed_dim)[0]) if projection else None

    @property
    def rule(self) -> HaltingRule:
        """When a token halts."""
        return HaltingRule(self.gamma, self.beta, self.eps, self.class_token_halts, self.direction)

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

    def _load_from_state_dict(self, weights: dict[str, Tensor], prefix: str, *args) -> None:
        if self.direction is not None:  # a plain model's weights have no projection
            weights.setdefault(f"{prefix}direction", self.direction.detach())
        super()._load_from_state_dict(weights, prefix, *args)

    def _packs(self) -> bool:
        if self.execution not in ("masked", "packed", "auto"):
            raise UserError(f"unknown execution {self.execution!r}; choose from masked, packed, auto")
        return self.execution == "packed" or (self.execution == "auto" and not self.training)


def run_masked(blocks: nn.Sequential, tokens: Tensor, rule: HaltingRule) -> tuple[Tensor, HaltingTrace]:
    """Algorithm 1 with masks, from the embedded tokens [B, N, D] to the representation [B, 1, D] and the trace."""
    state = initial_state(halting_score(tokens, rule))
    representation, scores, weights = 0.0, [], []
    for layer, block in enumerate(blocks, start=1):
        active = state.active
        tokens = tokens * active[..., None]  # t * m
        tokens = masked_block(block, tokens, active)
        score = halting_score(tokens, rule)  # h
        if layer == len(blocks):
            score = torch.ones_like(score)  # whoever comes this far halts here
        elif not rule.class_token_halts:
            score = torch.cat([torch.zeros_like(score[:, :1]), score[:, 1:]], dim=1)
        state, weight = halting_step(state, score, rule.eps)
        scores.append(torch.where(active, score, 0.0))
        weights.append(weight[:, :1])  # w of the class token
        representation = representation + weight[:, :1, None] * tokens[:, :1]
    trace = HaltingTrace(state.depth, state.ponder, torch.stack(scores, dim=1), torch.cat(weights, dim=1))
    return representation.to(tokens.dtype), trace


def masked_block(block: nn.Module, tokens: Tensor, active: Tensor) -> Tensor:
    """A block on tokens [B, N, D] of which only the ``active`` [B, N] are attended."""
    # An image without active tokens may attend anywhere: a row of keys all masked would give NaN.
    keys = active | ~active.any(dim=1, keepdim=True)
    return block(tokens, attn_mask=keys[:, None, None, :])


# --- registration with timm -------------------------------------------------------------------------------------------

# The last two are narrow backbones for 28 x 28 grey images, trained from random weights.
_GREY = dict(img_size=28, in_chans=1, num_classes=10, embed_dim=64, num_heads=2, mlp_ratio=2.0)
_UNTRAINED = dict(num_classes=10, input_size=(1, 28, 28), mean=(0.286,), std=(0.353,))
SHAPES = {
    "tiny_patch16_224": dict(patch_size=16, embed_dim=192, depth=12, num_heads=3),
    "small_patch16_224": dict(patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "base_patch16_224": dict(patch_size=16, embed_dim=768, depth=12, num_heads=12),
    "micro_patch4_28": _GREY | dict(patch_size=4, depth=12),
    "nano_patch7_28": _GREY | dict(patch_size=7, embed_dim=16, depth=4),
}
default_cfgs = {}  # timm reads them when a model is registered


def register(kind: str, model_class: type, size: str) -> None:
    """Register ``<kind>_<size>`` with timm: a ``model_class`` of the shape ``SHAPES[size]``."""
    name, grey = f"{kind}_{size}", size.endswith("_28")

    def create(pretrained: bool = False, **kwargs) -> VisionTransformer:
        options = {"pretrained_filter_fn": checkpoint_filter_fn} | SHAPES[size] | kwargs
        model = build_model_with_cfg(model_class, name, pretrained, **options)
        if grey:  # learnt positions start as sines and cosines, which saves epochs
            with torch.no_grad():
                sines = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), model.embed_dim)
                model.pos_embed[0, model.num_prefix_tokens :] = sines
        return model

    create.__name__ = name
    tag, cfg = ("untrained", _UNTRAINED) if grey else ("fb_in1k", get_pretrained_cfg(f"deit_{size}.fb_in1k"))
    default_cfgs.update(generate_default_cfgs({f"{name}.{tag}": cfg}))
    register_model(create)


for _size in SHAPES:
    register("avit", AViT, _size)
    if _size.endswith("_28"):  # timm has the others
        register("deit", VisionTransformer, _size)
