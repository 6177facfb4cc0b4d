"""What ``test`` and ``visualize`` do with one trained model: load it, its test images, its figures,
its picture.
"""

import io
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from avit_lib import data
from avit_lib.adaptive import Adaptive
from avit_lib.errors import UserError
from avit_lib.evaluation import bootstrap_intervals, metrics
from avit_lib.model import AViT
from avit_lib.study import adapting, pictures
from avit_lib.study.figures import legible
from avit_lib.study.releasing import released
from avit_lib.study.settings import get_profile
from avit_lib.study.study import Study, predict
from avit_lib.training import load_checkpoint, write_atomically

FORMATS = ("png", "jpg", "jpeg", "webp", "pdf", "svg")
FEW = 6  # images in a picture for which none are named, one a class
MOST = 240  # images in one picture, which matplotlib could not draw if it were much higher
KEY = """Depth is the number of layers that compute a token. Blue covers tokens that left the computation:
the earlier, the bluer; in the last row, those that did not reach the last layer"""


def load(
    profile: str, seed: int, device: str, name: str | None, path: Path | None
) -> tuple[nn.Module, dict, Path]:
    """The model in ``path``, else the run ``name``, trained here or committed; its description;
    where it lies.
    """
    study = Study(profile, seed, device=device)
    run = study.profile.run(name.lower() if name else study.profile.focus).name
    committed = released(study.profile.name, run)
    if not path:
        trained = (study.folder(run) / "last.safetensors").is_file() or not committed.is_file()
        path = study.checkpoint(run) if trained else committed
    model, description = load_checkpoint(path, study.device)
    trained_as = description.get("run", {}).get("settings", {}).get("name", run)
    kind = "avit" if isinstance(model, AViT) else "deit"
    if name and name.lower() not in (kind, trained_as):
        raise UserError(
            f"{path} was trained as {trained_as}, not {name}; correct --model or leave it out"
        )
    return model, {"classes": [], "seed": seed} | description.get("run", {}), path


def test_images(
    profile: str, folder: Path | None, model: nn.Module, run: dict, decode: bool = True
) -> data.Images:
    """The test images of a folder, else of the profile; raises UserError when the model knows other
    classes.
    """
    if folder:
        size = model.patch_embed.img_size[0]
        return data.folder_test_data(folder, size, run["classes"], decode)
    found = data.test_data(get_profile(profile).data, run["seed"], decode)
    if list(found.classes) == run["classes"]:
        return found
    raise UserError(
        f"the model knows other classes than those of the profile {profile}; add --data-dir DIR"
    )


def record_beside(path: Path) -> Path:
    """Where the figures of a tested checkpoint go; UserError where another's description lies."""
    target = path.with_name(f"{path.stem}_test.json")
    if target.with_suffix(".safetensors").exists():
        raise UserError(f"{target} describes a checkpoint of that name; rename one of them")
    return target


def figures_of(
    model: nn.Module, found: data.Images, seed: int, device: torch.device, batch: int
) -> dict[str, Any]:
    """Accuracy, depth, GFLOPs and so on of a model on test images, and their intervals."""
    predictions = predict(model, found, device, batch)
    values = {"images": len(found), **metrics(model, predictions)}
    return values | {"intervals": bootstrap_intervals(predictions, seed)}


def picture(
    model: nn.Module,
    run: dict,
    images: list[str],
    test_images: Callable[[], data.Images],
    device: torch.device,
) -> Figure:
    """Where a model stopped looking, in image files, or in ``test_images`` of these numbers.

    None named: the first test image of each of ``FEW`` classes, evenly spaced among all.
    Raises UserError when there is no such image, and for a model whose tokens all go through.
    """
    if not isinstance(model, AViT | Adaptive):
        raise UserError(
            "a model whose tokens all go through; name a checkpoint of an A-ViT, or of adapt"
        )
    classes, statistics, words = run["classes"], data.STATISTICS, []
    if not images and not classes:
        raise UserError("this model has no test images of its own; name image files by --images")
    images = images or one_of_each_class(test_images().labels)
    numbers = [int(name) for name in images if name.isdecimal()]
    if len(images) > MOST:
        raise UserError(f"{len(images)} images are too many for one picture; name {MOST} at most")
    if numbers and (len(numbers) < len(images) or not classes):
        raise UserError(
            "--images takes paths, or else numbers of the test images of a model that fit trained"
        )
    if numbers:
        found = test_images()
        if max(numbers) >= len(found):
            raise UserError(
                f"there is no test image {max(numbers)}; the numbers go from 0 to {len(found) - 1}"
            )
        pixels, labels = found[numbers]
        names = [f"true: {classes[label]}" for label in labels]
    else:
        for name in images:
            if Path(name).is_dir():
                raise UserError(f"{name!r} is a folder; name its files: {Path(name, '*.jpg')}")
        read, statistics = adapting.reader(model, run)
        pixels = torch.stack([read(Path(name)) for name in images])
        names = [f"{Path(name).resolve().parent.name}/{Path(name).name}" for name in images]
        words = [what_it_sees(model, classes)]
    with torch.inference_mode():
        logits, trace = model.forward_with_trace(pixels.to(device))
    depth = nn.functional.pad(
        trace.depth[:, model.num_prefix_tokens :].cpu(), (1, 0)
    )  # as if of a class token
    titles = adapting.titles(names, logits, trace.depth, classes)
    columns = math.ceil(
        len(images) / math.ceil(len(images) / 6)
    )  # at most six, and as many in every row
    pixels, grid = data.to_pixels(pixels, statistics), model.patch_embed.grid_size
    figure = pictures.depth_maps(pixels, depth, len(model.blocks), titles, columns, grid)
    words += [f"{KEY}{', here all.' if trace.depth.max() < len(model.blocks) else '.'}"]
    above = legible("\n".join(textwrap.fill(line, 100) for line in words))
    figure.suptitle(above, fontsize=9, parse_math=False)
    return figure


def one_of_each_class(labels: torch.Tensor) -> list[str]:
    """The number of the first test image of each of ``FEW`` classes, evenly spaced among all;
    labels [n].
    """
    known = labels.unique()
    few = known[torch.linspace(0, len(known) - 1, min(FEW, len(known))).long()]
    return [str((labels == label).nonzero()[0].item()) for label in few]


def write_picture(figure: Figure, output: Path) -> None:
    """Write ``figure`` in the format of the suffix, PNG without one; UserError for an unknown
    one.
    """
    kind = output.suffix.lower()[1:] or "png"
    if kind not in FORMATS:
        raise UserError(f"--output must end in .{', .'.join(FORMATS)}, not {output.name!r}")
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, dpi=150, bbox_inches="tight")
    write_atomically(output, drawn.getvalue())


def what_it_sees(model: nn.Module, classes: list[str]) -> str:
    """What becomes of a photograph, and among which classes it is put, in a sentence."""
    height, width = model.patch_embed.img_size
    known = f": {', '.join(classes)}" if 0 < len(classes) <= 10 else ""
    return (
        f"Photographs are cropped to their centre and scaled to {height} x {width} pixels, for "
        f"that is what this model sees. It knows {model.num_classes:,} classes{known}."
    )
