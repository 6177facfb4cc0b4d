"""Write a moving picture of tokens that leave, layer by layer: results/PROFILE/figures/tokens.webp.

    python scripts/animate.py [--profile caltech24] [--seed 0]

Test photographs, one of a class, drawn by the seed; above by the A-ViT that the profile looks into,
below by adaptive merging. Both are trained by `make reproduce`.
"""

import argparse
import io
import sys

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from avit_lib.data import pick_per_class, to_pixels
from avit_lib.errors import UserError
from avit_lib.report import pictures
from avit_lib.study import Study
from avit_lib.training import write_atomically

COLUMNS = 6
DURATION, HELD = 450, 2000  # milliseconds that a layer is shown, and the last one


def draw_frame(pixels: torch.Tensor, grids: dict, titles: list[str], layer: int) -> Image.Image:
    """The photographs after ``layer`` layers, not the last: what has left is covered."""
    rows: list[pictures.Row] = []
    for name, grid in grids.items():
        words = f"{name}\nafter layer\n{layer}"
        rows.append((words, pictures.veiled(pixels, grid <= layer), titles))
        titles = []
    figure = pictures.mosaic(rows)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def animate(profile: str, seed: int) -> None:
    """Trace the photographs and write the picture; UserError when a model is not trained."""
    study = Study(profile, seed)
    generator = torch.Generator().manual_seed(seed)
    one_each = pick_per_class(study.test.labels, 1, generator)
    chosen = one_each[torch.randperm(len(one_each), generator=generator)[:COLUMNS]]
    images, labels = study.test[chosen]
    grids = {}
    for name, run in (("A-ViT", study.profile.focus), ("merging", "merging")):
        model = study.load(run)
        with torch.inference_mode():
            trace = model.forward_with_trace(images.to(study.device))[1]
        grids[name] = pictures.grids(trace.depth.cpu())
    layers, pixels = len(model.blocks), to_pixels(images)
    titles = [study.test.classes[label].replace("_", " ") for label in labels]
    frames = [draw_frame(pixels, grids, titles, layer) for layer in range(layers)]
    durations = [DURATION] * (layers - 1) + [HELD]
    moving = io.BytesIO()
    look = {"save_all": True, "append_images": frames[1:], "duration": durations, "loop": 0}
    frames[0].save(moving, "WEBP", quality=70, method=6, **look)
    target = study.results.folder / "figures" / "tokens.webp"
    write_atomically(target, moving.getvalue())
    print(f"written to {target}: {len(frames)} frames, {len(moving.getvalue()) / 2**20:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="caltech24", help="a profile by name or file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        animate(options.profile, options.seed)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
