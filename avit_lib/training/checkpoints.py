"""Checkpoints: weights as safetensors, beside each a JSON from which the model is rebuilt."""

import hashlib
import pickle
import textwrap
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from msgspec import Struct, ValidationError, convert
from safetensors import SafetensorError
from safetensors.torch import save
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from avit_lib.adaptive import without_thresholds
from avit_lib.errors import UserError, name_some
from avit_lib.places import digest_file, weights_file
from avit_lib.training.files import read_json, write_atomically, write_json

# What safetensors and torch raise for files that are damaged or hold something else, such as code.
BAD_WEIGHTS = (
    SafetensorError,
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
)


def create_model(name: str, arguments: dict[str, Any]) -> nn.Module:
    """The timm model called ``name``, untrained; raises UserError when timm knows none such."""
    if not timm.is_model(name):
        raise UserError(f"there is no model {name!r}; timm.list_models() names them all")
    try:
        return timm.create_model(name, **arguments)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{name} cannot be made: {error}; name another model") from None


def save_checkpoint(
    path: Path, model: nn.Module, name: str, arguments: dict[str, Any], **facts: Any
) -> None:
    """Write ``path`` (.safetensors), and beside it as JSON what rebuilds the model, and facts.

    The JSON comes first: weights that lie without one are of somebody else.
    """
    weights = save({key: value.contiguous() for key, value in model.state_dict().items()})
    known = {"model": name, "arguments": arguments, "sha256": hashlib.sha256(weights).hexdigest()}
    write_json(path.with_suffix(".json"), known | facts)
    write_atomically(path, weights)


def load_checkpoint(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the model of a checkpoint, in evaluation mode; returns it and its description.

    Raises UserError when a file is damaged, or holds another model than its JSON says.
    """
    path = Path(path)
    weights = read_weights(path)
    description = read_description(path)
    model = create_model(description["model"], description["arguments"])
    if "thresholds" in weights:  # its tokens merge
        model = without_thresholds(model)
    _load_strictly(model, weights, path)
    return model.to(device).eval(), description


class DescribedRun(Struct, frozen=True):
    """What the JSON beside weights says of a run, if it does."""

    classes: list[str] = []
    seed: int = 0
    images: list[Any] = []
    settings: dict[str, Any] = {}


class Described(Struct):
    """What the JSON beside weights has to say; facts stand beside it."""

    model: str
    arguments: dict[str, Any]
    sha256: str
    run: DescribedRun = DescribedRun()


def read_description(path: Path) -> dict[str, Any]:
    """What the JSON beside the weights in ``path`` says; UserError unless it is of these."""
    beside = path.with_suffix(".json")
    description = read_json(beside)
    try:
        known = convert(description, Described)
    except ValidationError as error:
        raise UserError(
            f"{beside} does not describe a model ({error}); move it, or train again"
        ) from None
    if digest_file(path) != known.sha256:
        raise UserError(
            f"{path} does not match the checksum beside it: it is damaged or foreign; "
            f"train it again"
        )
    return description


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict of the same shape, DeiT into A-ViT say; raises UserError if it differs.

    The weights alone: what decides on the tokens that leave, as gamma does, stays as it is.
    """
    weights = read_weights(Path(path))
    for name in getattr(model, "added", ()):
        weights.pop(name, None)
    _load_strictly(model, weights, path)


def load_pretrained(model: nn.Module, timm_name: str, new_head: bool = False) -> None:
    """Load ImageNet weights from the file that ``places`` has for them, else from timm's hub.

    With ``new_head``, for other classes, the classification head is left at its initialisation;
    positions are resampled to the model's grid. Raises UserError without weights, and for those of
    another model.
    """
    path = weights_file(timm_name)
    if not path.is_file():
        path = _download(timm_name)
    try:
        weights = checkpoint_filter_fn(read_weights(path), model)
    except RuntimeError as error:  # positions that can't be resampled
        raise UserError(f"{path} is of another model: {error}") from None
    own = model.state_dict()
    if new_head:
        weights |= {key: own[key] for key in ("head.weight", "head.bias") if key in own}
    _load_strictly(model, weights, path)


def _download(timm_name: str) -> Path:
    """The weights from timm's hub, always as safetensors, in the hub's cache."""
    try:
        repository = timm.get_pretrained_cfg(timm_name).hf_hub_id
        return Path(hf_hub_download(repository, "model.safetensors"))
    except (OSError, RuntimeError, AttributeError) as error:  # the last: where timm knows of none
        raise UserError(
            f"no weights of {timm_name}: {weights_file(timm_name)} is missing, and timm's hub has "
            f"none or is out of reach; work in a clone of the repository, put the file there, or "
            f"name its folder in AVIT_WEIGHTS"
        ) from error


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a .safetensors or .pth, also of a wrapped model or a whole checkpoint."""
    path.open("rb").close()  # what may not be read is told by Python best
    try:
        weights = timm.models.load_state_dict(str(path), weights_only=True)
        others = [name for name, one in weights.items() if not torch.is_floating_point(one)]
    except BAD_WEIGHTS:
        raise UserError(
            f"{path} is not a whole safetensors file, nor a state dict that torch saved; train or "
            f"download it again, or save the state_dict() of its model alone"
        ) from None
    if others:
        raise UserError(f"{path} has weights that are no real numbers; delete {name_some(others)}")
    return weights


def _load_strictly(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 300)
        raise UserError(f"{path} is of another model: {reason}") from None
