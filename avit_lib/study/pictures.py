"""Pictures of images and of what becomes of their tokens: arrays or CPU tensors in, a matplotlib Figure out.

B images, N tokens (token 0 is the class token, the others form a square grid [G, G]), L layers; images [B, C, H, W] are
grey or colour, values 0..1; depth [B, N] in layers.
"""

import textwrap

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from avit_lib.study.figures import WIDTH, subplots

DEPTH_COLOURS = "inferno"  # dark: halted early; bright: went deep
VEIL = (0.20, 0.38, 0.70)  # what covers halted tokens: a colour, so that it shows on black and on white

Row = tuple[str, list[np.ndarray], list[str]]  # its name, pictures [H, W, 3], and titles above them, if any


def mosaic(rows: list[Row], span: tuple[int, int] | None = None, layers: int = 0) -> Figure:
    """Rows of square pictures with their names on the left; with the key of depth maps whose colours cover ``span``."""
    columns = max(len(pictures) for _, pictures, _ in rows)
    side = (WIDTH - 1.0) / columns
    height = sum(side + 0.2 * bool(titles) for _, _, titles in rows) + (0.7 if span else 0)
    figure, axes = subplots(len(rows), columns, height, "compressed")
    for axis in axes.flat:
        bare(axis)
    for (name, pictures, titles), row in zip(rows, axes, strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=6)
        for axis, picture in zip(row, pictures, strict=False):
            axis.imshow(picture)
        for axis, title in zip(row, titles, strict=False):
            lines = textwrap.fill(title.replace("_", " "), max(8, 100 // columns), break_long_words=False)
            axis.set_title(lines, fontsize=9)
    if span:
        _depth_key(figure, axes, span, layers)
    return figure


def bare(axis: mpl.axes.Axes) -> None:
    """No ticks, no grid, no frame: for pictures."""
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)


def samples(images: ArrayLike, labels: ArrayLike, classes: tuple[str, ...], most: int = 10) -> Figure:
    """Images [B, C, H, W] with labels [B], a row for each class (``most`` of them if there are more)."""
    labels = np.asarray(labels)
    present = np.unique(labels)
    shown = present[np.linspace(0, len(present) - 1, min(most, len(present))).round().astype(int)]
    rows = [(label, [rgb(images[index]) for index in np.flatnonzero(labels == label)]) for label in shown]
    return mosaic([(classes[label].replace("_", " "), pictures, []) for label, pictures in rows])


def depth_maps(images: ArrayLike, depth: ArrayLike, layers: int, titles: list[str] | None = None) -> Figure:
    """Images with the depth of their tokens, in four rows.

    The image; its depth map, whose colours span the depths shown, the same for all; the image under a veil that is the
    thicker the earlier a token halted (spanning them too, but for the outer 2 percent at either end); and what is left
    in the last layer.
    """
    grid = grids(depth)
    shallowest, deepest = np.percentile(grid, (2, 98))
    veil = ((deepest - grid) / max(deepest - shallowest, 1)).clip(0, 1)
    rows = [
        ("image", [rgb(image) for image in images], titles or []),
        ("depth", list(coloured(grid, _span(grid))), []),
        ("veiled\nby depth", [veiled(*pair) for pair in zip(images, veil, strict=True)], []),
        ("in the\nlast layer", [veiled(*pair) for pair in zip(images, grid < layers, strict=True)], []),
    ]
    return mosaic(rows, _span(grid), layers)


def depth_extremes(groups: dict[str, tuple[ArrayLike, ArrayLike, list[str]]], layers: int) -> Figure:
    """For each named group: images [B, C, H, W] with titles [B] above the depth maps of their tokens [B, N]."""
    span = _span(np.concatenate([grids(depth) for _, depth, _ in groups.values()]))
    rows = []
    for name, (images, depth, titles) in groups.items():
        rows += [(name, [rgb(image) for image in images], titles), ("", list(coloured(grids(depth), span)), [])]
    return mosaic(rows, span, layers)


def halting_progress(images: ArrayLike, depth: ArrayLike, rows: int = 7) -> Figure:
    """What each layer still computes on: images in which the tokens halted before it are veiled.

    Shows at most ``rows`` layers, from the last that computes all patches of these images to the deepest reached, with
    the share of patches above each picture.
    """
    grid = grids(depth)
    shown = []
    for layer in np.unique(np.linspace(grid.min(), grid.max(), rows).round().astype(int)):
        pictures = [veiled(*pair) for pair in zip(images, grid < layer, strict=True)]
        shown.append((f"layer {layer}", pictures, [f"{(one >= layer).mean():.0%}" for one in grid]))
    return mosaic(shown)


def grids(depth: ArrayLike) -> np.ndarray:
    """The depth [B, N] of the patch tokens in their places, [B, G, G] float; the class token is left out."""
    patches = np.asarray(depth, dtype=float)[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    return patches.reshape(-1, side, side)


def coloured(grid: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """Depths [..., G, G] as colours [..., G, G, 3], which run over ``span``."""
    return mpl.colormaps[DEPTH_COLOURS](Normalize(*span)(grid))[..., :3]


def rgb(image: ArrayLike) -> np.ndarray:
    """An image [C, H, W] as RGB [H, W, 3]; grey becomes colour, so that veils know one case only."""
    image = np.clip(np.asarray(image, dtype=float), 0, 1)
    return np.broadcast_to(image.transpose(1, 2, 0), (*image.shape[1:], 3))


def veiled(image: ArrayLike, veil: np.ndarray, most: float = 0.88) -> np.ndarray:
    """An image [C, H, W] as RGB [H, W, 3], each token covered as far as ``veil`` [G, G] says: 0 not, 1 nearly all."""
    pixels = rgb(image)
    patch = pixels.shape[0] // len(veil)
    opacity = most * np.kron(veil, np.ones((patch, patch)))[..., None]
    return (1 - opacity) * pixels + opacity * np.array(VEIL)


def _span(grid: np.ndarray) -> tuple[int, int]:
    """The shallowest and the deepest of whole-layer depths."""
    return int(grid.min()), int(grid.max())


def _depth_key(figure: Figure, axes: np.ndarray, span: tuple[int, int], layers: int) -> None:
    """The key of depth maps, below them: one colour a layer."""
    shown = np.arange(span[0], span[1] + 1)
    norm = BoundaryNorm(np.append(shown, shown[-1] + 1) - 0.5, len(shown))
    key = ScalarMappable(norm, mpl.colormaps[DEPTH_COLOURS].resampled(len(shown)))
    bar = figure.colorbar(key, ax=axes, orientation="horizontal", shrink=0.7, aspect=45, pad=0.015)
    bar.set_ticks(shown, labels=[str(layer) for layer in shown])
    bar.minorticks_off()
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    bar.set_label(f"depth [layers of {layers}]")
