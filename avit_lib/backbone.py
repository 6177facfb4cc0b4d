"""timm's VisionTransformer as a base for models whose tokens leave: its interface, kept or refused.

Two kinds of models stand on it: one whose tokens halt (``model.AViT``) and one whose tokens merge
(``adaptive.Adaptive``). Each says what its layers make of images; what timm offers in public
follows from that here, so that no inherited method runs the plain transformer instead.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import DropPath, GluMlp, Mlp, PatchEmbed, SwiGLU
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Attention, Block, LayerScale, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from avit_lib.errors import UserError


def call(function: Callable, *arguments: Any) -> Any:
    """Call a ``function`` that computes a layer: each layer of each execution goes through here."""
    return function(*arguments)


class TokensLeave(VisionTransformer):
    """A VisionTransformer of timm's whose tokens leave the computation.

    Its two subclasses say how, by ``compute_features(x, traced, observe)`` of images [B, C, H, W]:
    normalised features and, at least if ``traced``, the trace. ``observe``, if any, is called after
    each layer with all tokens [B, N, D]; one that has left stays as its last layer made it.
    """

    # Buffers that decide who leaves: float32 whatever the weights are; a plain model lacks them.
    added: tuple[str, ...] = ()

    def embed(self, images: Tensor) -> Tensor:
        """The tokens [B, N, D] that enter the first layer, of images [B, C, H, W]."""
        if is_hooked(self.blocks):
            raise UserError("a hook on all blocks at once would never be called; put it on a block")
        if not is_plain_sequence(self.blocks):
            raise UserError("blocks of a class of its own would never be called; use nn.Sequential")
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))

    def forward(self, x: Tensor, *, with_trace: bool = False) -> Any:
        """Logits [B, K] of images [B, C, H, W]; with ``with_trace`` the pair of them and the trace.

        Raises UserError where somebody counts on tokens that have left.
        """
        features, trace = self.compute_features(x, with_trace)
        logits = self.forward_head(features)
        return (logits, trace) if with_trace else logits

    def forward_with_trace(self, images: Tensor) -> tuple[Tensor, Any]:
        """Logits [B, K] of images [B, C, H, W] and the trace of every token."""
        return self(images, with_trace=True)

    def forward_features(self, x: Tensor, attn_mask: None = None) -> Tensor:
        """What ``forward_head`` takes, normalised, of images [B, C, H, W]; no mask is taken."""
        _refuse_mask(attn_mask)
        return self.compute_features(x, traced=False)[0]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        attn_mask: None = None,
    ) -> Any:
        """As timm's: tokens after the layers ``indices``, all in their places, and the features.

        A token that halted stays as its last layer made it; one that merged is like the one that
        stands for it. All layers are computed, also with ``stop_early``: the features need them.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt {output_fmt!r} is unknown; choose from NCHW, NLC")
        _refuse_mask(attn_mask)
        layers = []
        features, _ = self.compute_features(x, traced=False, observe=layers.append)
        taken, _ = feature_take_indices(len(layers), indices)
        chosen = [self.norm(layers[one]) if norm else layers[one] for one in sorted({*taken})]
        count = self.num_prefix_tokens
        maps = [tokens[:, count:] for tokens in chosen]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
            maps = [tokens.transpose(1, 2).unflatten(2, grid).contiguous() for tokens in maps]
        if return_prefix_tokens and count:
            prefix = [tokens[:, :count] for tokens in chosen]
            maps = list(zip(maps, prefix, strict=True))
        return maps if intermediates_only else (features, maps)

    def run(self, function: Callable, *arguments: Any) -> Any:
        """``call``, checkpointed if timm's switch says so."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(call, function, *arguments, use_reentrant=False)
        return call(function, *arguments)

    @torch.compiler.disable  # it would guard each of some hundred parts
    def hooked(self) -> bool:
        """Whether somebody listens to a block or to a part of one."""
        parts = [*self.blocks]
        for part in parts:  # grows; several times as fast as modules()
            if is_hooked(part):
                return True
            parts += [child for child in part._modules.values() if child is not None]
        return False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward_features":
            raise UserError("a replaced forward_features would never be called; replace forward")
        if name in self.added:
            if isinstance(value, nn.Parameter):
                raise UserError(f"{name} is a fixed number, not a parameter that is trained")
            value = torch.as_tensor(value, dtype=torch.float32, device=self._buffers[name].device)
            value = value.clone()  # or it would follow what somebody does to his own
        super().__setattr__(name, value)

    def _apply(self, fn: Callable, recurse: bool = True) -> "TokensLeave":
        before = {name: self._buffers[name] for name in self.added}
        super()._apply(fn, recurse)
        for name, value in before.items():
            if not value.is_meta:
                self._buffers[name] = value.to(self._buffers[name].device)
        return self

    def _load_from_state_dict(self, weights: dict[str, Tensor], prefix: str, *args) -> None:
        own = {f"{prefix}{name}": self._buffers[name] for name in self.added}
        if not own.keys() & weights.keys():  # a plain model's
            weights.update(own)
        super()._load_from_state_dict(weights, prefix, *args)


def _refuse_mask(mask: Tensor | None) -> None:
    if mask is not None:
        raise UserError("tokens that leave have no place in a mask; leave out attn_mask")


def attend_as_class(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """What the class token, the first, takes from each token [B, N].

    That is attention times norm of the value, mean over heads. ``query``, ``key`` and ``value`` are
    [B, heads, N, d]; ``bias`` [B, N] is added to the logits of each key.
    """
    logits = query[:, :, :1] @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    attention = (logits[:, :, 0] + bias[:, None]).softmax(dim=2)  # [B, heads, N]
    if value.dtype == torch.float16:
        value = value.float()  # or its square may be too large
    norm = torch.linalg.vecdot(value, value).sqrt()  # on CPUs several times as fast as torch's
    return (attention * norm).mean(dim=1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let ``model`` be in evaluation mode; afterwards each part is in its own mode again."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def is_plain_sequence(blocks: nn.Module) -> bool:
    """Whether calling ``blocks`` is calling one after the other."""
    return type(blocks) is nn.Sequential and "forward" not in vars(blocks)


def is_hooked(part: nn.Module) -> bool:
    """Whether somebody asked to be called when ``part`` is computed or differentiated."""
    forward = part._forward_hooks or part._forward_pre_hooks
    return bool(forward or part._backward_hooks or part._backward_pre_hooks)


def check_followed(model: VisionTransformer) -> None:
    """Raise UserError where somebody counts on the tokens of a model that merges in their places.

    Its blocks are not called, but their norms and MLPs.
    """
    if reason := why_not_plain(model):
        raise UserError(f"tokens can't merge any more: {reason}")
    parts = [model.blocks]
    for block in model.blocks:
        attention = block.attn
        parts += [block, block.drop_path1, block.drop_path2, attention]
        parts += [attention.attn_drop, attention.q_norm, attention.k_norm]
    if any(map(is_hooked, parts)):
        raise UserError(
            "a hook on a block would never be called, since tokens merge inside of it; "
            "use forward_intermediates of an adapted model, or a hook on its norms or MLP (which "
            "gets the tokens of all images [T, D], in another order)"
        )


def check_images(images: Tensor, least: int = 1) -> None:
    """Raise UserError unless ``images`` are finite numbers [B, C, H, W], at ``least`` so many."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        raise UserError("images are needed as one tensor of floats [B, C, H, W], normalised")
    if len(images) < least:
        raise UserError(f"{len(images)} images are too few; take some hundred")
    if not images.isfinite().all():
        raise UserError(
            "the images contain values that are no numbers (NaN or infinite); mend them"
        )


def is_exporting() -> bool:
    """Whether an exporter follows one batch, to compute all others alike."""
    # Until torch 2.12 its compiler counts as an exporter, too.
    exports = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return torch.jit.is_tracing() or exports


def why_not_plain(model: VisionTransformer) -> str:
    """Why tokens can't leave the blocks of ``model``, in words; empty if they can."""
    patches = type(model.patch_embed)
    if patches is not PatchEmbed:
        return f"its patches come from a {patches.__name__}, not from timm's PatchEmbed"
    if not is_plain_sequence(model.blocks):
        return f"its blocks are a {type(model.blocks).__name__}, not torch's plain nn.Sequential"
    for kind in (Block, Attention):
        if kind.forward.__module__ != kind.__module__ or hasattr(kind.forward, "__wrapped__"):
            return f"the forward of timm's {kind.__name__} was replaced"
    for block in model.blocks:
        for part, kinds in _list_parts(block):
            if type(part) not in kinds or "forward" in vars(part):
                return f"a {type(part).__name__} of its blocks is not timm's plain one"
        if getattr(block.attn, "gate", None) is not None:
            return "its attention is gated"
        if block.attn.scale != block.attn.head_dim**-0.5:
            return "its attention has a scale of its own"
    return ""


def _list_parts(block: nn.Module) -> Iterator[tuple[nn.Module, tuple[type, ...]]]:
    """A block and its parts, each with the classes it may have; another block may lack some."""
    yield block, (Block,)
    yield block.attn, (Attention,)
    yield block.mlp, (Mlp, GluMlp, SwiGLU)  # in which no token sees another
    for scale in (block.ls1, block.ls2):
        yield scale, (LayerScale, nn.Identity)
    for drop in (block.drop_path1, block.drop_path2, block.attn.attn_drop):
        yield drop, (nn.Identity, nn.Dropout, DropPath)  # which do nothing in evaluation
    for norm in (block.attn.q_norm, block.attn.k_norm):
        yield norm, (type(norm),)  # any, but a forward of its own would be passed by
