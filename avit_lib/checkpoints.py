"""Checkpoints: weights as safetensors, beside each a JSON from which the model is rebuilt."""

import errno
import hashlib
import io
import json
import os
import pickle
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

import avit_lib.models  # noqa: F401  registers the avit_* models
from avit_lib.config import StudyError, weights_dir


def write_atomically(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write a file under a temporary name, then move it: a reader sees the old content or the new, never half.

    The old content is kept as ``previous``, if given. Raises StudyError when the disk is full or may not be written
    to; the old content is then untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the name, or a power cut could leave it empty
        if previous and path.is_file():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def make_writable(folder: Path) -> None:
    """Make ``folder`` and try whether files can be written there; raises StudyError when not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(path: Path, error: OSError) -> StudyError:
    remedy = "free some space" if error.errno == errno.ENOSPC else "name another folder, or allow writing there"
    return StudyError(f"{path} cannot be written ({error.strerror}); {remedy}, then run the same command again")


def write_state(path: Path, state: dict[str, Any], previous: Path) -> None:
    """Write the state of a training, and after it its SHA-256, atomically; the old file is kept as ``previous``."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    write_atomically(path, content + hashlib.sha256(content).digest(), previous)


def read_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read what ``write_state`` wrote; raises StudyError when the checksum does not fit or more than data is in it."""
    content = path.read_bytes()
    content, checksum = content[:-32], content[-32:]
    if hashlib.sha256(content).digest() != checksum:
        raise StudyError(f"{path} is damaged: its checksum does not fit")
    try:
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise StudyError(f"{path} is not the state of a training ({str(error).splitlines()[0]})") from None


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

    A classification head of another size is left at its initialisation. Raises StudyError when neither is there, or
    what the hub sent does not have the checksum that the hub publishes.
    """
    path = weights_dir() / f"{timm_name}.safetensors"
    if not path.is_file():
        path = _download(timm_name, path)
    weights = _read_weights(path)
    own = model.state_dict()
    for key in ("head.weight", "head.bias"):
        if key in weights and weights[key].shape != own[key].shape:
            weights[key] = own[key]
    _load_strictly(model, weights, path)


def _download(timm_name: str, wanted: Path) -> Path:
    """The weights from timm's hub, always as safetensors, in the hub's cache.

    There a file is a link to one that bears the SHA-256 published by the hub as its name.
    """
    repository = timm.get_pretrained_cfg(timm_name).hf_hub_id
    try:
        path = Path(hf_hub_download(repository, "model.safetensors"))
    except (OSError, RuntimeError) as error:
        raise StudyError(
            f"no weights of {timm_name}: {wanted} is missing and timm's hub is out of reach; "
            f"put the file there, or name its folder in AVIT_WEIGHTS"
        ) from error
    published = path.resolve().name
    if re.fullmatch("[0-9a-f]{64}", published) and hashlib.sha256(path.read_bytes()).hexdigest() != published:
        raise StudyError(f"{path.resolve()} is damaged: timm's hub publishes another checksum; delete it")
    return path


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
