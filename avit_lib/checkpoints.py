"""Checkpoints: weights as safetensors, beside each a JSON from which the model is rebuilt."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

import avit_lib.models  # noqa: F401  registers the avit_* models
from avit_lib.config import StudyError, weights_dir

RESUME = "resume.pt"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then move it: a reader sees the old content or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; raises StudyError when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise StudyError(f"{path} is missing; make it again, or name another checkpoint") from None
    except ValueError as error:
        raise StudyError(f"{path} is damaged ({error}); delete it and make it again") from None


def create_model(name: str, arguments: dict[str, Any]) -> nn.Module:
    """The timm model called ``name``, untrained; raises StudyError when timm knows none of that name."""
    if not timm.is_model(name):
        raise StudyError(f"there is no model {name!r}; timm.list_models() names them all")
    return timm.create_model(name, **arguments)


def save_checkpoint(path: Path, model: nn.Module, name: str, arguments: dict[str, Any], **facts: Any) -> None:
    """Write ``path`` (.safetensors) and the JSON beside it: the model's timm name and arguments, checksum, facts."""
    weights = save({key: value.contiguous() for key, value in model.state_dict().items()})
    write_atomically(path, weights)
    description = {"model": name, "arguments": arguments, "sha256": hashlib.sha256(weights).hexdigest(), **facts}
    write_json(path.with_suffix(".json"), description)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the model of a checkpoint, in evaluation mode; returns it and its description.

    Raises StudyError when a file is missing, damaged, or holds another model than its JSON says.
    """
    path = Path(path)
    description = read_json(path.with_suffix(".json"))
    weights = _read_weights(path)
    if not isinstance(description, dict) or "sha256" not in description:
        raise StudyError(f"{path.with_suffix('.json')} does not describe a checkpoint; train it again")
    if hashlib.sha256(path.read_bytes()).hexdigest() != description["sha256"]:
        raise StudyError(f"{path} does not match the checksum beside it: it is damaged or foreign; train it again")
    try:
        model = create_model(description["model"], description["arguments"])
    except (KeyError, TypeError) as error:
        raise StudyError(f"{path.with_suffix('.json')} does not describe a model ({error}); train it again") from None
    _load_strictly(model, weights, path)
    return model.to(device).eval(), description


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict of the same shape (DeiT into A-ViT, say) into ``model``; raises StudyError if it differs."""
    _load_strictly(model, _read_weights(Path(path)), path)


def load_pretrained(model: nn.Module, timm_name: str) -> None:
    """Load ImageNet weights from $AVIT_WEIGHTS/<timm name>.safetensors, else from timm's hub.

    A classification head of another size is left at its initialisation. Raises StudyError when neither is there.
    """
    path = weights_dir() / f"{timm_name}.safetensors"
    if path.is_file():
        weights = _read_weights(path)
    else:
        try:
            weights = timm.create_model(timm_name, pretrained=True).state_dict()
        except (OSError, RuntimeError) as error:
            raise StudyError(
                f"no weights of {timm_name}: {path} is missing and timm's hub is out of reach; "
                f"put the file there, or name its folder in AVIT_WEIGHTS"
            ) from error
    own = model.state_dict()
    for key in ("head.weight", "head.bias"):
        if key in weights and weights[key].shape != own[key].shape:
            weights[key] = own[key]
    _load_strictly(model, weights, path)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise StudyError(f"checkpoint {path} is missing; train it first, or name another")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise StudyError(f"{path} is not a whole safetensors file ({error}); train or download it again") from None


def _load_strictly(model: nn.Module, weights: dict[str, torch.Tensor], path: Path | str) -> None:
    own = model.state_dict()
    if missing := sorted(own.keys() - weights.keys()):
        raise StudyError(f"{path} is of another architecture: it lacks {missing[0]} and {len(missing) - 1} more")
    if surplus := sorted(weights.keys() - own.keys()):
        raise StudyError(f"{path} is of another architecture: it has {surplus[0]} and {len(surplus) - 1} more to spare")
    for key, value in own.items():
        if value.shape != weights[key].shape:
            what = "number of classes" if key.startswith("head.") else "shape"
            raise StudyError(
                f"{path} has another {what}: {key} is {list(weights[key].shape)}, the model's {list(value.shape)}"
            )
    model.load_state_dict(weights)
