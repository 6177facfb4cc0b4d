"""Predictions kept on disk: a notebook that was interrupted, or a later one, reads them back."""

import hashlib
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from avit_lib.data import Images
from avit_lib.evaluation import Predictions
from avit_lib.places import digest_file
from avit_lib.training.files import write_atomically

# As imported: its files may change while a notebook runs.
LIBRARY = "".join(map(digest_file, sorted(Path(__file__).resolve().parents[1].rglob("*.py"))))
FIELDS = ("logits", "labels", "depth", "flops", "means")  # halting scores would take ten times this


def digest_images(data: Images) -> str:
    """The checksum of decoded images and their labels."""
    digest = hashlib.sha256()
    for part in (data.images, data.labels):
        digest.update(part.contiguous().numpy())
    return digest.hexdigest()


def digest_model(model: nn.Module) -> str:
    """The checksum of what computes: weights, this library, and the two that it stands on."""
    known = " ".join([version("torch"), version("timm"), LIBRARY])
    weights = save({name: value.contiguous() for name, value in model.state_dict().items()})
    return hashlib.sha256(known.encode() + weights).hexdigest()


def keep(path: Path, predictions: Predictions, of: str) -> None:
    """Write ``predictions`` without halting scores; ``of`` says of what they are."""
    tensors: dict[str, Tensor] = {name: getattr(predictions, name) for name in FIELDS}
    tensors["depth"] = tensors["depth"].to(torch.uint8)
    write_atomically(path, save(tensors, {"of": of, "layers": str(predictions.layers)}))


def read_kept(path: Path, of: str) -> Predictions | None:
    """The predictions that ``keep`` wrote; None where there are none, or of something else."""
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            if facts.get("of") != of:
                return None
            tensors = {name: file.get_tensor(name) for name in FIELDS}
    except (OSError, SafetensorError):
        return None
    tensors["depth"] = tensors["depth"].long()
    return Predictions(**tensors, halting_scores=torch.empty(0), layers=int(facts["layers"]))
