"""A-ViT on timm's VisionTransformer, registered with timm as ``avit_*``; no parameter more than a
DeiT or ViT.
"""

from collections.abc import Callable

import torch
from timm.layers import is_exportable, is_scriptable
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from avit_lib.backbone import TokensLeave, is_exporting, why_not_plain
from avit_lib.errors import UserError
from avit_lib.halting import HaltingRule, HaltingTrace, halting_score, halting_step, initial_state
from avit_lib.packed import call, predict_packed, run_packed
from avit_lib.places import no_weights, weights_file


class AViT(TokensLeave):
    """VisionTransformer whose tokens halt by themselves (A-ViT, section 3).

    The representation [B, 1, D] is the output-weighted sum of the class token over the layers. How
    it is computed is a setting, not a different model: ``execution`` is "masked" (halted tokens are
    computed and ignored, as published), "packed" (they are gone) or "auto" (packed in evaluation,
    masked in training). Who follows tokens to their places gets masked execution all the same: an
    exporter, a hook on a block, a block of one's own, an attention mask.
    """

    exact = ("gamma", "beta", "eps")
    added = (*exact, "class_token_runs_on")

    def __init__(
        self,
        *args,
        gamma: float = 5.0,
        beta: float = -10.0,
        eps: float = 0.01,
        class_token_halts: bool = True,
        projection: bool = False,
        execution: str = "auto",
        **kwargs,
    ):
        """The halting settings are those of ``HaltingRule``, the others timm's; raises UserError
        for what won't go.
        """
        _check_pooling(kwargs.get("global_pool"))
        needed = {"class_token": True, "reg_tokens": 0, "patch_drop_rate": 0}
        refused = [name for name, value in needed.items() if kwargs.get(name, value) != value]
        if refused:
            raise UserError(
                f"A-ViT reads its class token and follows every patch; leave out {', '.join(refused)}"
            )
        super().__init__(*args, **kwargs)
        if reason := why_not_plain(self):
            raise UserError(f"tokens can't halt in this model: {reason}")
        for name, value in (("gamma", gamma), ("beta", beta), ("eps", eps)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32, device="cpu"))
        # A state dict of the other kind is then refused: it has this one too many, or lacks it.
        self.register_buffer(
            "class_token_runs_on", None if class_token_halts else torch.tensor(True)
        )
        # A learned projection adds D parameters; it starts as what it replaces, channel 0.
        self.direction = nn.Parameter(self._channel_0()) if projection else None
        self.execution = "masked" if is_exportable() or is_scriptable() else execution

    @property
    def rule(self) -> HaltingRule:
        """When a token halts."""
        halts = self.class_token_runs_on is None
        return HaltingRule(self.gamma, self.beta, self.eps, halts, self.direction)

    def compute_features(
        self, x: Tensor, attn_mask: Tensor | None, traced: bool, whole: bool
    ) -> tuple[Tensor, HaltingTrace | None]:
        """The normalised representation [B, 1, D] of images [B, C, H, W], and the trace."""
        tokens, trace = self.embed(x), None
        if attn_mask is not None or not (self._packs() and len(x)):
            found, trace = run_masked(self.blocks, tokens, self.rule, attn_mask, self.run)
        elif traced:
            found, trace = run_packed(self.blocks, tokens, self.rule, self.run)
        else:
            found = predict_packed(self.blocks, tokens, self.rule, self.run)
        return self.norm(found), trace

    def compute_layers(self, x: Tensor, attn_mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The normalised representation [B, 1, D], and the tokens [B, N, D] after each layer."""
        layers = [self.embed(x)]

        def observe(active: Tensor, tokens: Tensor) -> None:
            layers.append(torch.where(active[..., None], tokens, layers[-1]))

        found, _ = run_masked(self.blocks, layers[0], self.rule, attn_mask, self.run, observe)
        return self.norm(found), layers[1:]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As timm's; raises UserError for another pooling than that of the class token."""
        _check_pooling(global_pool)
        super().reset_classifier(num_classes, global_pool)

    def _channel_0(self) -> Tensor:
        return torch.eye(self.embed_dim, 1)[:, 0].to(self.cls_token.detach())

    def _load_from_state_dict(self, weights: dict[str, Tensor], prefix: str, *args) -> None:
        if self.direction is not None:  # who reads channel 0 has none
            weights.setdefault(f"{prefix}direction", self._channel_0())
        if (
            self.class_token_runs_on is not None and f"{prefix}gamma" not in weights
        ):  # a plain model
            weights[f"{prefix}class_token_runs_on"] = self.class_token_runs_on
        super()._load_from_state_dict(weights, prefix, *args)

    def _packs(self) -> bool:
        if self.execution not in ("masked", "packed", "auto"):
            raise UserError(
                f"unknown execution {self.execution!r}; choose from masked, packed, auto"
            )
        wanted = self.execution == "packed" or (self.execution == "auto" and not self.training)
        return wanted and not (is_exporting() or self.hooked() or why_not_plain(self))


def _check_pooling(global_pool: str | None) -> None:
    if global_pool not in (None, "token", ""):
        raise UserError(f"A-ViT reads its class token alone; leave out global_pool {global_pool!r}")


def run_masked(
    blocks: nn.Sequential,
    tokens: Tensor,
    rule: HaltingRule,
    attn_mask: Tensor | None = None,
    run: Callable = call,
    observe: Callable[[Tensor, Tensor], None] = lambda active, tokens: None,
) -> tuple[Tensor, HaltingTrace]:
    """Algorithm 1 with masks, from the embedded tokens [B, N, D] to the representation [B, 1, D]
    and the trace.

    ``attn_mask`` as timm's; ``run`` calls the function of a layer; ``observe`` is told after each
    layer which tokens were active [B, N], and what became of them [B, N, D].
    """
    state = initial_state(halting_score(tokens, rule))
    representation, scores, weights = 0.0, [], []
    for layer, block in enumerate(blocks, start=1):
        active = state.active
        tokens = tokens * active[..., None]  # t * m
        tokens = run(masked_block, block, tokens, active, attn_mask)
        observe(active, tokens)
        score = halting_score(tokens, rule)  # h
        if layer == len(blocks):
            score = torch.ones_like(score)  # whoever comes this far halts here
        elif not rule.class_token_halts:
            score = torch.cat([torch.zeros_like(score[:, :1]), score[:, 1:]], dim=1)
        state, weight = halting_step(state, score, rule.eps)
        scores.append(torch.where(active, score, 0.0))
        weights.append(weight[:, :1])  # w of the class token
        representation = representation + weight[:, :1, None] * tokens[:, :1]
    trace = HaltingTrace(
        state.depth, state.ponder, torch.stack(scores, dim=1), torch.cat(weights, dim=1)
    )
    return representation.to(tokens.dtype), trace


def masked_block(
    block: nn.Module, tokens: Tensor, active: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    """A block on tokens [B, N, D] of which only the ``active`` [B, N] are attended."""
    # An image without active tokens may attend anywhere: a row of keys all masked would give NaN.
    keys = (active | ~active.any(dim=1, keepdim=True))[:, None, None, :]
    # A bias, not a mask of truth values: some versions of timm would add those.
    bias = torch.zeros_like(keys, dtype=tokens.dtype).masked_fill(~keys, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.where(attn_mask, bias, -torch.inf)
    elif attn_mask is not None:
        bias = bias + attn_mask
    return block(tokens, attn_mask=bias)


# --- registration with timm -----------------------------------------------------------------------

SHAPES = {
    "tiny_patch16_224": dict(patch_size=16, embed_dim=192, depth=12, num_heads=3),
    "small_patch16_224": dict(patch_size=16, embed_dim=384, depth=12, num_heads=6),
    "base_patch16_224": dict(patch_size=16, embed_dim=768, depth=12, num_heads=12),
}
default_cfgs = {}  # timm reads them when a model is registered


def register(model_class: type, size: str) -> None:
    """Register ``avit_<size>`` with timm: a ``model_class`` of the shape ``SHAPES[size]``."""
    name, published = f"avit_{size}", f"deit_{size}.fb_in1k"

    def create(pretrained: bool = False, **kwargs) -> VisionTransformer:
        options = {"pretrained_filter_fn": checkpoint_filter_fn} | SHAPES[size] | kwargs
        options["feature_cfg"] = {
            "out_indices": options.pop("out_indices", 3),
            "feature_cls": "getter",
        }
        own = isinstance(options.get("pretrained_cfg"), str | None)  # not somebody else's weights
        if not (pretrained and own):
            return build_model_with_cfg(model_class, name, pretrained, **options)
        here = weights_file(published)
        if here.is_file():
            overlay = options.get("pretrained_cfg_overlay") or {}
            options["pretrained_cfg_overlay"] = {"file": str(here)} | overlay
        try:
            return build_model_with_cfg(model_class, name, pretrained, **options)
        except OSError as error:
            raise UserError(no_weights(published)) from error

    create.__name__ = name
    default_cfgs.update(generate_default_cfgs({f"{name}.fb_in1k": get_pretrained_cfg(published)}))
    register_model(create)


for _size in SHAPES:
    register(AViT, _size)
