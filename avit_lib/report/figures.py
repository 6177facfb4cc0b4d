"""The theme of all figures, and the charts drawn in several places.

Data in, Figure out, neither shown nor written.
"""

import io
import re
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import pandas as pd
import seaborn as sns
from matplotlib import rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font, get_font_names
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import ColorType
from numpy.typing import ArrayLike
from PIL import Image

from avit_lib.peers import PEERS

WIDTH = 8.0  # inches of every figure: at 100 dots an inch it fills a README
INK, MUTED = "#222222", "#707070"
PALETTE = sns.color_palette("colorblind")
AVIT_COLOURS = {  # by a word of the label; "C3" is PALETTE[3]
    "halting trained": "C3",
    "halting held": "C1",
    "calibrated": "#00573f",
    "halting taught": "#7f0000",
    "ImageNet": "C5",
    "published start": "C2",
    "paper's settings": "C2",
}
# In the order of the registry, then again.
PEER_COLOURS = ("C4", "#6a3d9a", "#806000", "C8", "C6", "#66a61e", "#e7298a")
OTHER_COLOURS = {
    "merging trained": INK,
    "Adaptive": "C7",
    "longer": "C9",
    "DeiT": "C0",
}
SPARE_COLOURS = ("#aa4499", "#332288", "#999933", "#882255", "#44aa99")  # of models of one's own
CURVES = {  # marker and line, by a word of the label
    "A-ViT": ("o", "--"),
    " trained at": ("X", "--"),
    " trained": ("P", "-"),
    "Adaptive": ("D", "-."),
    "": ("s", ":"),
}


class NotebookFigure(Figure):
    """A figure, unknown to pyplot, that a notebook shows as PNG when a cell ends in it."""

    def _repr_png_(self) -> bytes:
        drawn, png = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png", bbox_inches="tight")
        # By a palette it takes a third of the bytes in a notebook, and looks the same.
        Image.open(drawn).convert("RGB").quantize(256).save(png, "png", optimize=True)
        return png.getvalue()


@cache
def theme() -> dict[str, Any]:
    """The settings of matplotlib in ``theme.mplstyle``, of its fonts those that this system has."""
    settings = rc_params_from_file(
        Path(__file__).with_name("theme.mplstyle"), use_default_template=False
    )
    # A font that is missing would warn at every word.
    settings["font.family"] = [one for one in settings["font.family"] if one in get_font_names()]
    return settings


def subplots(
    rows: int = 1, columns: int = 1, height: float = 3.2, layout: str = "constrained", **kwargs
):
    """An empty figure, ``height`` inches high, and its axes [rows, columns].

    Sets the theme for good: every tick and label that is added later reads it.
    """
    sns.set_theme(style="whitegrid", palette="colorblind", rc=theme())
    figure = NotebookFigure(figsize=(WIDTH, height), dpi=100, layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def legible(words: str) -> str:
    """``words``, escaped (such as \\u732b) where no font can draw them or they are not UTF-8."""
    paths = [findfont(FontProperties(family=[one])) for one in theme()["font.family"]]
    known = {ord("\n")}.union(*(get_font(path).get_charmap() for path in paths))
    return "".join(one if ord(one) in known else ascii(one)[1:-1] for one in words)


def model_colour(label: str) -> ColorType:
    """The colour of a model in every figure: by kind, so that DeiT and DeiT-T share it."""
    kind = label.split(", ")[0].split(" trained")[0]
    if kind in PEERS:
        return PEER_COLOURS[[*PEERS].index(kind) % len(PEER_COLOURS)]
    kinds = AVIT_COLOURS if label.startswith("A-ViT") else OTHER_COLOURS
    spare = SPARE_COLOURS[crc32(kind.encode()) % len(SPARE_COLOURS)]
    return next((colour for word, colour in kinds.items() if word in label), spare)


def percent(axis: Axes, which: str = "y") -> None:
    """Write the fractions of an axis as percentages."""
    getattr(axis, f"{which}axis").set_major_formatter(lambda share, _: f"{100 * share:.6g}%")


def legend_above(figure: Figure, axis: Axes) -> Figure:
    """``figure`` with the legend of ``axis`` above it, in as many lines as it takes."""
    handles, labels = axis.get_legend_handles_labels()
    columns = 110 // (max(map(len, labels)) + 7)  # characters that fit beside each other
    figure.legend(handles, labels, loc="outside upper center", ncols=max(columns, 1))
    return figure


def learning_curves(histories: dict[str, pd.DataFrame], panels: dict[str, str]) -> Figure:
    """A panel for each history column in ``panels`` (column: axis label), a line for each model."""
    figure, axes = subplots(1, len(panels), 2.9)
    for axis, (column, label) in zip(axes[0], panels.items(), strict=True):
        for model, history in histories.items():
            if column in history:
                axis.plot(
                    history["epoch"], history[column], "o-", color=model_colour(model), label=model
                )
        axis.set(xlabel="epoch", ylabel=label)
        if "accuracy" in column:
            percent(axis)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    return legend_above(figure, axes[0, 0])


def curve(
    axis: Axes,
    name: str,
    x: ArrayLike,
    value: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    label: str,
) -> None:
    """A curve in the look of the model ``name``, with a bar ``low`` to ``high`` at each point."""
    colour = model_colour(name)
    marker, line = next(look for word, look in CURVES.items() if word in name)
    axis.plot(x, value, color=colour, marker=marker, markersize=7, linestyle=line, label=label)
    axis.vlines(x, low, high, color=colour, linewidth=1.2, alpha=0.45)


def difference_against(table: pd.DataFrame, x: str, xlabel: str) -> Figure:
    """Columns ``difference_macro``, low and high of a ``table`` of models, against column ``x``.

    What is merged by several r or thresholds is joined to a curve, and so is each model at several
    depths; the legend names them in the order of the curve.
    """
    curves = table.groupby(table["model"].str.split(", ").str[0], sort=False)
    figure, [[axis]] = subplots(height=4.2 + 0.2 * len(curves))  # the legend has a line for each
    for name, part in curves:
        part = part.sort_values(x)
        points = ", ".join(one.partition(", ")[2] or "as trained" for one in part["model"])
        points = re.sub(r", \w+ = ", ", ", points)  # once is enough
        label = f"{name}: {points}" if len(part) > 1 else name
        ends = 100 * part["low_macro"], 100 * part["high_macro"]
        curve(axis, name, part[x], 100 * part["difference_macro"], *ends, label)
    axis.set(xlabel=xlabel, ylabel="mean per-class accuracy minus DeiT's [points]")
    return legend_above(figure, axis)
