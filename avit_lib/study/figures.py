"""The theme of all figures, and the charts drawn in several places: data in, Figure out, neither
shown nor written.
"""

import io
from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib import rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font, get_font_names
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from matplotlib.typing import ColorType
from numpy.typing import ArrayLike

WIDTH = 8.0  # inches of every figure: at 100 dots an inch it fills a README
INK, MUTED = "#222222", "#707070"
PALETTE = sns.color_palette("colorblind")
SPEED_COLOURS = {"DeiT": PALETTE[0], "A-ViT masked": PALETTE[7], "A-ViT packed": PALETTE[1]}
AVIT_COLOURS = {  # by a word of the label
    "halting trained": PALETTE[3],
    "halting held": PALETTE[1],
    "ImageNet": PALETTE[5],
    "": PALETTE[2],
}
OTHER_COLOURS = {
    "ToMe": PALETTE[4],
    "merging trained": INK,
    "Adaptive": PALETTE[7],
    "longer": PALETTE[9],
    "": PALETTE[0],
}
CURVES = {  # marker, line, what is varied and stands beside the points
    "ToMe": ("s", ":", "r"),
    "Adaptive merging": ("D", "-.", "FLOPs saved"),
    "Adaptive merging trained": ("P", "-", "FLOPs saved"),
}
BY_BETA = ("o", "--", "mean depth")
PLACES = [
    (7, 5),
    (7, -12),
    (-25, 5),
    (-25, -12),
    (-8, 12),
    (-8, -20),
    (9, -3),
    (-27, -3),
]  # of words by a point
HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps words legible on lines
THEME = rc_params_from_file(Path(__file__).with_name("theme.mplstyle"), use_default_template=False)
# A font that is missing would warn at every word.
THEME["font.family"] = [name for name in THEME["font.family"] if name in get_font_names()]


class NotebookFigure(Figure):
    """A figure that a notebook shows as PNG when a cell ends in it, though pyplot does not know of
    it.
    """

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png", bbox_inches="tight", facecolor="white")
        return png.getvalue()


def subplots(
    rows: int = 1, columns: int = 1, height: float = 3.2, layout: str = "constrained", **kwargs
):
    """An empty figure, ``height`` inches high and unknown to pyplot, and its axes [rows,
    columns].
    """
    sns.set_theme(
        style="whitegrid", palette="colorblind", rc=THEME
    )  # for good: every new tick and label reads it
    figure = NotebookFigure(figsize=(WIDTH, height), dpi=100, layout=layout)
    if layout == "constrained":
        figure.get_layout_engine().set(wspace=0.05, hspace=0.05)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def legible(words: str) -> str:
    """``words``, escaped (such as \\u732b) where no font can draw them or they are not UTF-8."""
    fonts = [get_font(findfont(FontProperties([family]))) for family in THEME["font.family"]]
    known = {ord("\n")}.union(*(font.get_charmap() for font in fonts))
    return "".join(one if ord(one) in known else ascii(one)[1:-1] for one in words)


def model_colour(label: str) -> ColorType:
    """The colour of a model in every figure: by kind, so that DeiT and DeiT-T share it."""
    kinds = AVIT_COLOURS if label.startswith("A-ViT") else OTHER_COLOURS
    return next(colour for word, colour in kinds.items() if word in label)


def percent(axis: Axes, which: str = "y") -> None:
    """Write the fractions of an axis as percentages."""
    getattr(axis, f"{which}axis").set_major_formatter(lambda share, _: f"{100 * share:.6g}%")


def legend_above(figure: Figure, axis: Axes) -> Figure:
    """``figure`` with the legend of ``axis`` above it, in as many lines as it takes."""
    handles, labels = axis.get_legend_handles_labels()
    for rows in range(1, len(labels) + 1):
        columns = [labels[first : first + rows] for first in range(0, len(labels), rows)]
        if (
            sum(max(map(len, column)) + 7 for column in columns) <= 110
        ):  # what fits beside each other
            break
    figure.legend(handles, labels, loc="outside upper center", ncols=len(columns))
    return figure


def learning_curves(histories: dict[str, pd.DataFrame], panels: dict[str, str]) -> Figure:
    """One panel for each history column in ``panels`` (column: axis label), one line for each model
    that has it.
    """
    figure, axes = subplots(1, len(panels), 2.9)
    for axis, (column, label) in zip(axes[0], panels.items(), strict=True):
        for model, history in histories.items():
            if column in history:
                axis.plot(
                    history["epoch"],
                    history[column],
                    marker="o",
                    color=model_colour(model),
                    label=model,
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
    """A curve in the look of the model ``name``, with a bar from ``low`` to ``high`` at each
    point.
    """
    colour, (marker, line, _) = model_colour(name), CURVES.get(name, BY_BETA)
    axis.plot(x, value, color=colour, marker=marker, markersize=7, linestyle=line, label=label)
    axis.vlines(x, low, high, color=colour, linewidth=1.2, alpha=0.45)


def accuracy_against(
    table: pd.DataFrame,
    x: str,
    xlabel: str,
    accuracy: str = "accuracy",
    points: pd.DataFrame | None = None,
) -> Figure:
    """Column ``accuracy`` of the evaluation ``table`` with its interval against column ``x``, in
    the colours of models.

    What is merged by several r or thresholds is joined to a curve, and so are the ``points`` of
    each model at several depths; beside a point of a curve stands its r, share of FLOPs saved or
    mean depth.
    """
    figure, [[axis]] = subplots(height=5.0)
    rows, notes = pd.concat([table, points]).drop_duplicates("model"), []
    for name, part in rows.groupby(rows["model"].str.split(", ").str[0], sort=False):
        part, varied = part.sort_values(x), CURVES.get(name, BY_BETA)[2]
        label = f"{name}, by {varied}" if len(part) > 1 else name
        curve(
            axis,
            name,
            part[x],
            part[accuracy],
            part[f"{accuracy}_low"],
            part[f"{accuracy}_high"],
            label,
        )
        for row in part.itertuples() if len(part) > 1 else ():
            beside = {"r": row.model.split()[-1], "mean depth": f"{row.mean_depth:.1f}"}
            beside["FLOPs saved"] = f"{row.flops_saved:.0%}"
            notes.append(
                (beside[varied], (getattr(row, x), getattr(row, accuracy)), model_colour(name))
            )
    axis.margins(x=0.07)
    axis.set(
        xlabel=xlabel,
        ylabel="accuracy, mean over classes" if accuracy.endswith("_macro") else "accuracy",
    )
    percent(axis)
    legend_above(figure, axis)
    label_points(figure, axis, notes, rows[[x, accuracy]].to_numpy())
    return figure


def label_points(
    figure: Figure, axis: Axes, notes: list[tuple[str, ArrayLike, ColorType]], points: ArrayLike
) -> None:
    """Write each note (words, point, colour) beside its point, where it covers the fewest notes and
    ``points`` [P, 2].

    Of equally good places it takes the one that covers least of the axis' lines.
    """
    look = {"textcoords": "offset points", "fontsize": 8, "path_effects": HALO}
    written = [
        axis.annotate(words, point, PLACES[0], color=colour, **look)
        for words, point, colour in notes
    ]
    figure.draw_without_rendering()  # places in pixels are known only now
    markers = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axis.transData.transform(points)]
    paths = [line.get_transform().transform_path(line.get_path()) for line in axis.get_lines()]
    lines = [
        Bbox.from_bounds(x - 1, y - 1, 2, 2)
        for path in paths
        for x, y in path.interpolated(50).vertices
    ]
    for note in written:

        def covered(place: tuple[float, float], note=note) -> tuple[int, int]:
            note.set_position(place)
            extent = note.get_window_extent()
            return extent.count_overlaps(markers), extent.count_overlaps(lines)

        note.set_position(min(PLACES, key=covered))
        markers.append(note.get_window_extent())


# --- time -----------------------------------------------------------------------------------------


def speedup_against_flops(sweep: pd.DataFrame) -> Figure:
    """Measured speed-up of packed A-ViT over DeiT against the ratio of FLOPs, with quartiles, a
    point a mean depth.
    """
    figure, [[axis]] = subplots(height=3.8)
    highest = 1.06 * max(sweep["flops_ratio"].max(), sweep["speedup_high"].max())
    axis.plot(
        [1, highest], [1, highest], color=MUTED, linestyle="--", label="ideal: time follows FLOPs"
    )
    axis.axhline(1, color=SPEED_COLOURS["DeiT"], linewidth=1.2, label="DeiT")
    look = {"color": SPEED_COLOURS["A-ViT packed"], "label": "A-ViT packed, synthetic halting"}
    spread = [sweep["speedup"] - sweep["speedup_low"], sweep["speedup_high"] - sweep["speedup"]]
    axis.errorbar(
        sweep["flops_ratio"], sweep["speedup"], spread, fmt="o-", ecolor=INK, capsize=4, **look
    )
    axis.set_xlabel("FLOPs of DeiT / FLOPs of A-ViT (beside the points: mean depth in layers)")
    axis.set(
        ylabel="images/s, A-ViT / DeiT", ylim=(min(0.8, 0.7 * sweep["speedup_low"].min()), highest)
    )
    legend_above(figure, axis)
    points = sweep[["flops_ratio", "speedup"]].to_numpy()
    notes = [
        (f"{depth:g}", point, INK) for depth, point in zip(sweep["mean_depth"], points, strict=True)
    ]
    label_points(figure, axis, notes, points)
    return figure


def throughput_by_batch(table: pd.DataFrame) -> Figure:
    """Images a second against batch size, with quartiles, a line a model; a panel for each task and
    precision.
    """
    panels = list(table.groupby(["task", "precision"], sort=False))
    rows = -(-len(panels) // 2)
    figure, axes = subplots(rows, min(2, len(panels)), 2.9 * rows, sharex=True)
    for axis, ((task, precision), part) in zip(axes.flat, panels, strict=False):
        for model, line in part.groupby("model", sort=False):
            low, high = line["images_per_second_low"], line["images_per_second_high"]
            axis.fill_between(
                line["batch"], low, high, color=SPEED_COLOURS[model], alpha=0.2, linewidth=0
            )
            axis.plot(
                line["batch"],
                line["images_per_second"],
                color=SPEED_COLOURS[model],
                marker="o",
                label=model,
            )
        batch_axis(axis, part["batch"])
        axis.set(title=f"{task}, {precision}", ylabel="images/s", ylim=(0, None))
    return legend_above(figure, axes[0, 0])


def batch_axis(axis: Axes, batches: ArrayLike) -> None:
    """Batch sizes along the x axis, on a logarithmic scale."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(set(batches)), sorted(set(batches)))
    axis.minorticks_off()
    axis.set_xlabel("batch size [images]")


def layer_times(table: pd.DataFrame) -> Figure:
    """Time of every layer, DeiT's and packed A-ViT's, and the tokens that are left in it."""
    figure, [[axis]] = subplots(height=3.4)
    for offset, column, label in ((-0.19, "deit", "DeiT"), (0.19, "packed", "A-ViT packed")):
        axis.bar(
            table["layer"] + offset, table[column], 0.38, color=SPEED_COLOURS[label], label=label
        )
    ideal = "mean of DeiT x share of tokens left"
    axis.plot(table["layer"], table["ideal"], "_", color=INK, markersize=14, mew=2, label=ideal)
    axis.set(
        xlabel="layer, and below it the tokens of an image that are left in it",
        ylabel="time [ms per image]",
    )
    axis.set_xticks(
        table["layer"], [f"{row.layer}\n{row.tokens:.0f}" for row in table.itertuples()]
    )
    axis.grid(axis="x", visible=False)
    return legend_above(figure, axis)
