"""A-ViT on timm's VisionTransformer, registered with timm as ``avit_*``.

It has no parameter more than a DeiT or ViT.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from avit_lib.backbone import TokensLeave, call, is_exporting, why_not_plain
from avit_lib.errors import UserError
from avit_lib.flops import flops_of_depth
from avit_lib.halting import (
    HaltingRule,
    HaltingTrace,
    executed_depth,
    fade,
    halting_score,
    halting_step,
    initial_state,
)
from avit_lib.packed import run_packed
from avit_lib.places import weights_file

EXECUTIONS = ("auto", "masked", "packed")


class AViT(TokensLeave):
    """VisionTransformer whose tokens halt by themselves (A-ViT, section 3).

    The representation [B, 1, D] is the output-weighted sum of the class token over the layers. How
    it is computed is a setting, not a different model: ``execution`` is "masked" (halted tokens are
    computed and ignored, as published), "packed" (they are gone) or "auto" (packed in evaluation,
    masked in training). Who follows tokens to their places gets masked execution all the same: an
    exporter, a hook on a block, a block of one's own.
    """

    added = ("gamma", "beta", "eps")
    task_gradient = 0.0  # in training, see ``halting.fade``; 0: as published

    def __init__(
        self,
        *args,
        gamma: float = 5.0,
        beta: float = -10.0,
        eps: float = 0.01,
        execution: str = "auto",
        **kwargs,
    ):
        """The halting settings are those of ``HaltingRule``, the others timm's.

        Raises UserError for what won't go.
        """
        super().__init__(*args, **kwargs)
        _check_pooling(self.global_pool)
        one_class_token = self.has_class_token and self.num_prefix_tokens == 1
        if not one_class_token or not isinstance(self.patch_drop, nn.Identity):
            raise UserError(
                "A-ViT reads its one class token and keeps every patch; "
                "leave out class_token, reg_tokens and patch_drop_rate"
            )
        if reason := why_not_plain(self):
            raise UserError(f"tokens can't halt in this model: {reason}")
        for name, value in (("gamma", gamma), ("beta", beta), ("eps", eps)):
            self.register_buffer(name, torch.zeros((), device="cpu"))
            setattr(self, name, value)
        self.execution = execution

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.added and not math.isfinite(value):
            raise UserError(f"{name} must be a finite number, not {value}")
        if name == "eps" and not 0 < value < 1:
            raise UserError(f"eps must lie between 0 and 1, not {value}")
        if name == "execution" and value not in EXECUTIONS:
            raise UserError(f"execution {value!r} is unknown; choose from {', '.join(EXECUTIONS)}")
        super().__setattr__(name, value)

    @property
    def rule(self) -> HaltingRule:
        """When a token halts."""
        strength = self.task_gradient if self.training else 0.0
        return HaltingRule(self.gamma, self.beta, self.eps, strength)

    def compute_features(
        self, x: Tensor, traced: bool, observe: Callable | None = None
    ) -> tuple[Tensor, HaltingTrace | None]:
        """The normalised representation [B, 1, D] of images [B, C, H, W], and the trace."""
        tokens = self.embed(x)
        if observe is None and self._packs() and len(x):
            found, trace = run_packed(self.blocks, tokens, self.rule, traced, self.run)
        else:
            found, trace = run_masked(self.blocks, tokens, self.rule, self.run, observe)
        return self.norm(found), trace

    def flops_of(self, trace: HaltingTrace) -> Tensor:
        """FLOPs [B] of plain inference, which ends with the class token, on the images traced."""
        return flops_of_depth(self, executed_depth(trace.depth))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """As timm's; raises UserError for another pooling than that of the class token."""
        _check_pooling(global_pool)
        super().reset_classifier(num_classes, global_pool)

    def _packs(self) -> bool:
        wanted = {"masked": False, "packed": True, "auto": not self.training}[self.execution]
        return wanted and not (is_exporting() or self.hooked() or why_not_plain(self))


def _check_pooling(global_pool: str | None) -> None:
    if global_pool not in (None, "token", ""):
        raise UserError(f"A-ViT reads its class token alone; leave out global_pool {global_pool!r}")


def run_masked(
    blocks: nn.Sequential,
    tokens: Tensor,
    rule: HaltingRule,
    run: Callable = call,
    observe: Callable | None = None,
) -> tuple[Tensor, HaltingTrace]:
    """Algorithm 1 with masks: representation [B, 1, D] and trace of embedded tokens [B, N, D].

    ``run`` calls the function of a layer; ``observe`` is told after each layer what has become of
    all tokens [B, N, D].
    """
    state = initial_state(halting_score(tokens, rule))
    representation = torch.zeros_like(tokens[:, :1])
    seen = tokens
    scores, weights = [], []
    for layer, block in enumerate(blocks, start=1):
        active = state.active
        tokens = tokens * active[..., None]  # t * m
        bias = fade(state.cumulative, rule) if rule.task_gradient else 0.0
        tokens = run(masked_block, block, tokens, active, bias)
        if observe:
            seen = torch.where(active[..., None], tokens, seen)
            observe(seen)
        score = halting_score(tokens, rule, last=layer == len(blocks))  # h
        state, weight = halting_step(state, score, rule.eps)
        scores.append(torch.where(active, score, 0.0))
        weights.append(weight[:, 0])  # w of the class token
        representation = representation + weight[:, :1, None] * tokens[:, :1]
    scores, weights = torch.stack(scores, dim=1), torch.stack(weights, dim=1)
    return representation.to(tokens.dtype), HaltingTrace(state.depth, state.ponder, scores, weights)


def masked_block(
    block: nn.Module, tokens: Tensor, active: Tensor, added: float | Tensor = 0.0
) -> Tensor:
    """A block on tokens [B, N, D] of which only the ``active`` [B, N] are attended.

    ``added`` [B, N] is added to the attention logits of each key.
    """
    # An image without active tokens may attend anywhere: a row of keys all masked would give NaN.
    keys = active | ~active.any(dim=1, keepdim=True)
    # A bias, not a mask of truth values: some versions of timm would add those. In the precision of
    # attention, or that would be computed in float32.
    kind = tokens.device.type
    precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tokens.dtype
    bias = (torch.zeros_like(tokens[..., 0]) + added).masked_fill(~keys, -torch.inf)
    return block(tokens, attn_mask=bias[:, None, None].to(precision))


# --- registration with timm -----------------------------------------------------------------------

HEADS = {"tiny": 3, "small": 6, "base": 12}  # of width 64, in each of 12 layers
default_cfgs = {}  # timm reads them when a model is registered


def register(size: str) -> None:
    """Register ``avit_<size>_patch16_224`` with timm, an A-ViT of DeiT's shape."""
    name, published = f"avit_{size}_patch16_224", f"deit_{size}_patch16_224.fb_in1k"
    shape = dict(patch_size=16, embed_dim=64 * HEADS[size], depth=12, num_heads=HEADS[size])

    def create(pretrained: bool = False, **kwargs) -> AViT:
        options = {"pretrained_filter_fn": checkpoint_filter_fn} | shape | kwargs
        features = {"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"}
        here = weights_file(published)
        # With a pretrained_cfg of its own, the weights are somebody else's.
        ours = pretrained and isinstance(options.get("pretrained_cfg"), str | None)
        overlay = options.get("pretrained_cfg_overlay") or {}
        named = {"file", "url", "state_dict", "hf_hub_id"} & overlay.keys()
        if ours and not named and here.is_file():
            options["pretrained_cfg_overlay"] = {"file": str(here)} | overlay
        return build_model_with_cfg(AViT, name, pretrained, feature_cfg=features, **options)

    create.__name__ = name
    default_cfgs.update(generate_default_cfgs({f"{name}.fb_in1k": get_pretrained_cfg(published)}))
    register_model(create)


for _size in HEADS:
    register(_size)
