"""Put the default study's photographs and weights into data/; measure what rounding costs.

    python scripts/embed.py CALTECH101 WEIGHTS

CALTECH101: the folder 101_ObjectCategories; WEIGHTS: deit_tiny_patch16_224.fb_in1k.safetensors,
float32. Photographs are copied as they are; weights are rounded to float16. data/SHA256SUMS lists
everything that was embedded, and data/weights/rounding.json what rounding changes on the
photographs.
"""

import shutil
import sys
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from avit_lib.data import loader
from avit_lib.data.datasets import official_images
from avit_lib.places import digest_file
from avit_lib.study import get_profile
from avit_lib.training import write_json

DATA = Path(__file__).parents[1] / "data"
NAME = "deit_tiny_patch16_224.fb_in1k"


def embed_photographs(source: Path) -> list[Path]:
    """Copy the classes of the default study; returns the files."""
    files = []
    for name in get_profile("caltech24").data.classes:
        target = DATA / "caltech101" / "101_ObjectCategories" / name
        shutil.copytree(source / name, target, dirs_exist_ok=True)
        files += sorted(target.glob("*.jpg"))
    return files


def embed_weights(source: Path) -> Path:
    """Round the weights; returns the file."""
    target = DATA / "weights" / f"{NAME}.safetensors"
    target.parent.mkdir(exist_ok=True)
    save_file({key: value.half() for key, value in load_file(source).items()}, target)
    return target


@torch.inference_mode()
def measure_rounding(whole: Path, rounded: Path) -> dict[str, float]:
    """How predictions by rounded weights differ from those by whole ones: KL (nats), agreement."""
    photographs = official_images(get_profile("caltech24").data, train=True)
    models = [timm.create_model("deit_tiny_patch16_224").eval() for _ in range(2)]
    for model, path in zip(models, (whole, rounded), strict=True):
        model.load_state_dict(load_file(path))
    divergence, agree = 0.0, 0
    for images, _ in loader(photographs, 64):
        expected, found = (F.log_softmax(model(images), dim=1) for model in models)
        divergence += F.kl_div(found, expected, reduction="sum", log_target=True).item()
        agree += (found.argmax(dim=1) == expected.argmax(dim=1)).sum().item()
    count = len(photographs)
    return {"photographs": count, "kl": divergence / count, "agreement": agree / count}


def main() -> None:
    photographs, weights = Path(sys.argv[1]), Path(sys.argv[2])
    rounded = embed_weights(weights)
    files = [*embed_photographs(photographs), rounded]
    sums = [f"{digest_file(path)}  {path.relative_to(DATA)}" for path in files]
    (DATA / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    facts = {"sha256_of_the_published_file": digest_file(weights)}
    write_json(DATA / "weights" / "rounding.json", facts | measure_rounding(weights, rounded))


if __name__ == "__main__":
    main()
