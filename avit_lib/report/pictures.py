"""Pictures of images and of what becomes of their tokens.

Arrays or CPU tensors in, a matplotlib Figure out. B images [B, C, H, W], grey or colour, 0..1;
depth [B, N] in layers, of the class token and then of a grid of patches of R rows and K columns.
"""

import textwrap
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from avit_lib.report.figures import WIDTH, legible, subplots

DEPTH_COLOURS = "inferno"  # dark: halted early; bright: went deep
VEIL = (0.20, 0.38, 0.70)  # covers halted tokens: a colour, so that it shows on black and on white

# Its name, pictures [B, H, W, 3], and titles above them, if any.
Row = tuple[str, np.ndarray, Sequence[str]]


def mosaic(rows: list[Row], layers: int = 0, columns: int = 0) -> Figure:
    """Rows of pictures, their names on the left; with ``layers``, the key of depth maps below.

    More than ``columns`` pictures go on in further rows. Names and titles are drawn as they are
    written: no part of them is a formula.
    """
    count = max(len(pictures) for _, pictures, _ in rows)
    columns = min(columns or count, count)
    rows = [
        (name, pictures[first : first + columns], titles[first : first + columns])
        for first in range(0, count, columns)
        for name, pictures, titles in rows
    ]
    side = (WIDTH - 1.0) / columns
    height = 0.7 if layers else 0
    for _, pictures, titles in rows:
        lines = max((1 + title.count("\n") for title in titles), default=0)
        height += side * len(pictures[0]) / len(pictures[0][0]) + 0.2 * lines
    figure, axes = subplots(len(rows), columns, height, "compressed")
    size = 9 if columns <= 8 else 8
    for axis in axes.flat:
        bare(axis)
    for (name, pictures, titles), row in zip(rows, axes, strict=True):
        look = {"rotation": 0, "ha": "right", "va": "center", "labelpad": 6}
        row[0].set_ylabel(legible(name), parse_math=False, **look)
        for axis, picture in zip(row, pictures, strict=False):
            axis.imshow(picture)
        for axis, title in zip(row, titles, strict=False):
            words = _wrap(legible(title), max(8, 100 // columns))
            axis.set_title(words, fontsize=size, parse_math=False)
    if layers:
        _depth_key(figure, axes, layers)
    return figure


def _wrap(words: str, width: int) -> str:
    """Lines of ``width``; a long word stays whole, unless it would cover the next picture's."""
    lines = words.split("\n")
    return "\n".join(
        textwrap.fill(line, width, break_long_words=len(line) > 3 * width) for line in lines
    )


def bare(axis: mpl.axes.Axes) -> None:
    """No ticks, no grid, no frame: for pictures."""
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.spines[:].set_visible(False)


def depth_maps(
    images: ArrayLike,
    depth: ArrayLike,
    layers: int,
    titles: Sequence[str] = (),
    columns: int = 10,
    grid: tuple[int, int] | None = None,
) -> Figure:
    """In four rows: images, depth maps, images veiled by depth, what the last layer sees.

    A token is veiled the more the earlier it halted: not at all after the last layer. More than
    ``columns`` images go on in four further rows. ``grid`` is (R, K); default: that of square
    patches.
    """
    grid = grids(depth, grid or np.shape(images)[2:])
    veil = (layers - grid) / max(layers - 1, 1)
    rows = [
        ("image", rgb(images), titles),
        ("depth", coloured(grid, layers), []),
        ("veiled\nby depth", veiled(images, veil), []),
        ("in the\nlast layer", veiled(images, grid < layers), []),
    ]
    return mosaic(rows, layers, columns)


def grids(depth: ArrayLike, shape: tuple[int, int] = (1, 1)) -> np.ndarray:
    """The depth [B, N] of the patch tokens in their places, [B, R, K] float; no class token.

    ``shape`` is (R, K), or (H, W) of the images if patches are square; default: as many rows as
    columns. Raises ValueError when N - 1 patches have no grid of this shape.
    """
    patches = np.asarray(depth, dtype=float)[:, 1:]
    rows = round((patches.shape[1] * shape[0] / shape[1]) ** 0.5)
    return patches.reshape(len(patches), rows, round(rows * shape[1] / shape[0]))


def coloured(grid: np.ndarray, layers: int) -> np.ndarray:
    """Depths [B, R, K] as colours [B, R, K, 3]; in every figure from layer 1 to the last."""
    return mpl.colormaps[DEPTH_COLOURS](Normalize(1, layers)(grid))[..., :3]


def rgb(images: ArrayLike) -> np.ndarray:
    """Images [B, C, H, W] as RGB [B, H, W, 3]; grey becomes colour."""
    pixels = np.clip(np.asarray(images, dtype=float), 0, 1).transpose(0, 2, 3, 1)
    return np.broadcast_to(pixels, (*pixels.shape[:3], 3))


def veiled(images: ArrayLike, veil: np.ndarray) -> np.ndarray:
    """Images [B, C, H, W] as RGB [B, H, W, 3], each token covered as ``veil`` [B, R, K] says.

    0 leaves it as it is, 1 covers nearly all of it.
    """
    pixels = rgb(images)
    height, width = pixels.shape[1] // veil.shape[1], pixels.shape[2] // veil.shape[2]  # of a patch
    opacity = 0.88 * np.kron(veil, np.ones((1, height, width)))[..., None]
    return (1 - opacity) * pixels + opacity * np.array(VEIL)


def _depth_key(figure: Figure, axes: np.ndarray, layers: int) -> None:
    """The key of depth maps, below them: one colour a layer."""
    colours = mpl.colormaps[DEPTH_COLOURS].resampled(layers)
    key = ScalarMappable(Normalize(0.5, layers + 0.5), colours)
    look = {"orientation": "horizontal", "shrink": 0.7, "aspect": 45, "pad": 0.015}
    bar = figure.colorbar(key, ax=axes, ticks=range(1, layers + 1), **look)
    bar.set_label(f"depth [layers of {layers}]")
    bar.outline.set_visible(False)
