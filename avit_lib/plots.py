"""The figures of the study: data in, matplotlib Figure out; nothing here shows or writes.

Arrays are NumPy arrays or CPU tensors. B images, N tokens (token 0 is the class token, the others form a square
grid), L layers, K classes; images [B, C, H, W] are grey or colour, values 0..1.
"""

import io
import textwrap

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

WIDTH = 8.0  # inches of every figure: at 100 dots an inch it fills a README
INK, MUTED = "#222222", "#707070"
PALETTE = sns.color_palette("colorblind")
DEPTH_COLOURS = "inferno"  # dark: halted early; bright: went deep
VEIL = (0.20, 0.38, 0.70)  # what covers halted tokens: a colour, so that it shows on black and on white
RIGHT, WRONG = PALETTE[0], PALETTE[3]
RC = {
    "font.size": 10, "axes.labelsize": 10, "axes.titlesize": 10, "legend.fontsize": 9,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "figure.titlesize": 11,
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.edgecolor": "#b5b5b5", "axes.linewidth": 0.8, "grid.color": "#e6e6e6", "grid.linewidth": 0.8, 
    "lines.linewidth": 1.8, "lines.markersize": 5, "legend.frameon": False, "image.interpolation": "nearest",
}  # fmt: skip


class NotebookFigure(Figure):
    """A figure that a notebook shows as PNG when a cell ends in it, though pyplot does not know of it."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png", bbox_inches="tight", facecolor="white")
        return png.getvalue()


def subplots(rows: int = 1, columns: int = 1, height: float = 3.2, layout: str = "constrained", **kwargs):
    """An empty figure in the theme of the study, ``height`` inches high, and its axes [rows, columns].

    The figure is unknown to pyplot, so nothing shows it by accident. The theme stays set: matplotlib reads it again
    whenever it makes a tick or a label.
    """
    sns.set_theme(style="whitegrid", palette="colorblind", rc=RC)
    figure = NotebookFigure(figsize=(WIDTH, height), dpi=100, layout=layout)
    if layout == "constrained":
        figure.get_layout_engine().set(wspace=0.05, hspace=0.05)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def model_colour(label: str) -> tuple[float, float, float]:
    """The colour of a model in every figure: by kind, so that DeiT and DeiT-T share it."""
    if label.startswith("ToMe"):
        return PALETTE[4]
    if not label.startswith("A-ViT"):
        return PALETTE[9 if "trained on" in label else 0]
    if "+" in label or "fitted" in label:
        return PALETTE[3]
    return PALETTE[1 if "fine-tuned" in label else 2]


# --- data and training -----------------------------------------------------------------------------------------------


def sample_grid(images: ArrayLike, labels: ArrayLike, classes: tuple[str, ...], most: int = 10) -> Figure:
    """Images [B, C, H, W] with labels [B], a row for each class (``most`` of them if there are more)."""
    labels = np.asarray(labels)
    present = np.unique(labels)
    shown = present[np.linspace(0, len(present) - 1, min(most, len(present))).round().astype(int)]
    columns = max(np.sum(labels == label) for label in shown)
    figure, axes = subplots(len(shown), columns, 0.9 * WIDTH * len(shown) / columns, "compressed")
    for row, label in zip(axes, shown, strict=True):
        _row_title(row[0], classes[label].replace("_", " "))
        for axis in row:
            _bare(axis)
        for axis, index in zip(row, np.flatnonzero(labels == label), strict=False):
            _picture(axis, _channels_last(images[index]))
    return figure


def learning_curves(histories: dict[str, pd.DataFrame], panels: dict[str, str]) -> Figure:
    """One panel for each history column in ``panels`` (column: axis label), one line for each model that has it."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = subplots(rows, columns, 2.9 * rows)
    for axis, (column, label) in zip(axes.flat, panels.items(), strict=False):
        for model, history in histories.items():
            if column in history:
                axis.plot(history["epoch"], history[column], marker="o", color=model_colour(model), label=model)
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    _legend_above(figure, axes[0, 0])
    return figure


def halting_distributions(distributions: dict[str, ArrayLike], target: ArrayLike) -> Figure:
    """Halting distribution [L] of each model as bars, and the ``target`` [L] that the loss pulls them to as a line."""
    figure, axes = subplots(height=3.3)
    axis = axes[0, 0]
    layer = np.arange(1, len(target) + 1)
    width = 0.8 / len(distributions)
    for position, (model, distribution) in enumerate(distributions.items()):
        offset = (position - (len(distributions) - 1) / 2) * width
        axis.bar(layer + offset, distribution, 0.92 * width, color=model_colour(model), label=model, linewidth=0)
    axis.plot(layer, target, color=INK, marker="o", label="target (Gaussian)")
    axis.set(xlabel="layer", ylabel="share of the halting score", xticks=layer)
    axis.grid(axis="x", visible=False)
    axis.yaxis.set_major_formatter(_percent)
    axis.legend()
    return figure


# --- evaluation ------------------------------------------------------------------------------------------------------


def confusion_matrix(confusion: ArrayLike, classes: tuple[str, ...]) -> Figure:
    """Counts [K, K], rows the true class, as percent of each row; with many classes without names and numbers."""
    return _confusion_map(_row_percent(confusion), classes, "images of the true class [%]", "Blues", 0, 100, "{:.0f}")


def confusion_change(confusion: ArrayLike, baseline: ArrayLike, classes: tuple[str, ...]) -> Figure:
    """Row percentages of counts [K, K] minus those of ``baseline`` [K, K]: orange for more, purple for fewer."""
    change = _row_percent(confusion) - _row_percent(baseline)
    limit = max(np.abs(change).max(), 1.0)
    return _confusion_map(change, classes, "change [percentage points]", "PuOr_r", -limit, limit, "{:+.1f}")


def accuracy_by_depth(groups: pd.DataFrame, layers: int) -> Figure:
    """Accuracy of images grouped by mean depth; ``groups`` has mean_depth, accuracy, low, high, one row a group."""
    figure, axes = subplots(height=3.3)
    axis = axes[0, 0]
    axis.errorbar(
        groups["mean_depth"], groups["accuracy"], _error(groups, "accuracy", "low", "high"),
        fmt="o-", color=PALETTE[1], ecolor=MUTED, elinewidth=1.2, capsize=3,
    )  # fmt: skip
    axis.set(xlabel=f"mean depth of the image's tokens [layers of {layers}]", ylabel="accuracy")
    axis.yaxis.set_major_formatter(_percent)
    return figure


def accuracy_against_flops(table: pd.DataFrame) -> Figure:
    """Accuracy with its interval against computation, one point for each row of the evaluation table."""
    figure, axes = subplots(height=3.4)
    axis = axes[0, 0]
    named = set()
    for row in table.itertuples():
        name, _, setting = row.model.partition(", ")  # ToMe, r = 8
        error = [[row.accuracy - row.accuracy_low], [row.accuracy_high - row.accuracy]]
        axis.errorbar(
            row.gflops_per_image, row.accuracy, error, fmt="o", color=model_colour(name), capsize=4, markersize=8,
            label=None if name in named else name,
        )  # fmt: skip
        place = (row.gflops_per_image, row.accuracy_high)
        axis.annotate(setting, place, (0, 4), textcoords="offset points", ha="center", color=INK, fontsize=9)
        named.add(name)
    axis.set(xlabel="computation [GFLOPs per image]", ylabel="accuracy")
    axis.set_xlim(0, 1.1 * table["gflops_per_image"].max())
    axis.margins(y=0.15)
    axis.yaxis.set_major_formatter(_percent)
    _legend_above(figure, axis)
    return figure


def accuracy_against_speed(table: pd.DataFrame, points: pd.DataFrame, accuracy: str = "accuracy") -> Figure:
    """Accuracy against speed-up over DeiT: models of the evaluation ``table``, and one model at several ``points``.

    Points of one model and those of token merging are joined; ``accuracy`` names the column to show.
    """
    figure, axes = subplots(height=4.2)
    axis = axes[0, 0]
    merged = table["model"].str.startswith("ToMe")
    for curve, style, meaning in ((table[merged], "s:", "tokens merged"), (points, "o--", "beta")):
        if len(curve):
            name = curve["model"].iloc[0].split(", depth")[0].split(", r =")[0]
            curve = curve.sort_values("speedup")
            colour, label = model_colour(name), f"{name}, by {meaning}"
            axis.plot(curve["speedup"], curve[accuracy], style, color=colour, linewidth=1.2, alpha=0.8, label=label)
    for row in table[~merged].itertuples():
        value = getattr(row, accuracy)
        error = [[value - getattr(row, f"{accuracy}_low")], [getattr(row, f"{accuracy}_high") - value]]
        colour = model_colour(row.model)
        axis.errorbar(row.speedup, value, error, fmt="o", color=colour, capsize=4, markersize=9, label=row.model)
    axis.set(xlabel="speed-up over DeiT, measured", ylabel=accuracy.replace("_macro", ", mean over classes"))
    axis.yaxis.set_major_formatter(_percent)
    axis.legend(fontsize=9)
    return figure


def class_change(table: pd.DataFrame, names: tuple[str, str], most: int = 10) -> Figure:
    """Accuracy by class of two models as arrows, for the ``most`` classes that lose and that gain most.

    ``table`` is that of ``tables.class_accuracy_table``; ``names`` are those of the models before and after.
    """
    losing, gaining = table[table["change"] < 0].head(most), table[table["change"] > 0].tail(most)
    shown = pd.concat([losing, gaining]).iloc[::-1].reset_index(drop=True)
    figure, axes = subplots(height=1.2 + 0.25 * max(len(shown), 1))
    axis = axes[0, 0]
    rows = np.arange(len(shown))
    axis.hlines(rows, shown["before"], shown["after"], color=MUTED, linewidth=1.5, zorder=1)
    for column, name, marker in (("before", names[0], "o"), ("after", names[1], "D")):
        axis.scatter(shown[column], rows, color=model_colour(name), marker=marker, label=name, zorder=2)
    axis.set_yticks(
        rows, [f"{row['class'].replace('_', ' ')} ({row.images})" for _, row in shown.iterrows()], fontsize=9
    )
    if len(losing) and len(gaining):
        axis.axhline(len(gaining) - 0.5, color=MUTED, linewidth=1, linestyle=":")
    axis.set(xlabel="accuracy on the class (in brackets its test images)", ylim=(-0.7, len(shown) - 0.3))
    axis.xaxis.set_major_formatter(_percent)
    axis.grid(axis="y", visible=False)
    _legend_above(figure, axis)
    return figure


# --- halting ---------------------------------------------------------------------------------------------------------


def depth_maps(images: ArrayLike, depth: ArrayLike, layers: int, titles: list[str] | None = None) -> Figure:
    """Images [B, C, H, W] with the depth [B, N] of their tokens, in four rows.

    The image; its depth map, whose colours span the depths shown, the same for all; the image under a veil that is the
    thicker the earlier a token halted (spanning them too, but for the outer 2 percent at either end); and what is left
    in the last layer.
    """
    count, grids = len(images), _grids(depth)
    shallowest, deepest = np.percentile(grids, (2, 98))
    veil = ((deepest - grids) / max(deepest - shallowest, 1)).clip(0, 1)
    figure, axes = subplots(4, count, 4 * (WIDTH - 0.9) / count + 0.9, "compressed")
    for name, row in zip(("image", "depth", "veiled\nby depth", "in the\nlast layer"), axes, strict=True):
        _row_title(row[0], name)
    for index in range(count):
        _picture(axes[0, index], _channels_last(images[index]))
        _depth_map(axes[1, index], grids[index], _span(grids))
        _picture(axes[2, index], _veiled(images[index], veil[index]))
        _picture(axes[3, index], _veiled(images[index], (grids[index] < layers).astype(float)))
        if titles is not None:
            axes[0, index].set_title(_wrapped(titles[index], count), fontsize=9)
    _depth_bar(figure, axes, _span(grids), layers)
    return figure


def depth_extremes(
    images: dict[str, ArrayLike], depth: dict[str, ArrayLike], layers: int, titles: dict[str, list[str]]
) -> Figure:
    """For each named group: images [B, C, H, W] above the depth maps of their tokens [B, N], with titles [B]."""
    count = max(len(group) for group in images.values())
    figure, axes = subplots(
        2 * len(images), count, len(images) * (2.1 * (WIDTH - 1.2) / count + 0.25) + 0.6, "compressed"
    )
    span = _span(np.concatenate([_grids(group) for group in depth.values()]))
    for group, name in enumerate(images):
        _row_title(axes[2 * group, 0], name)
        grids = _grids(depth[name])
        for index in range(count):
            above, below = axes[2 * group, index], axes[2 * group + 1, index]
            _bare(above)
            _bare(below)
            if index < len(grids):
                _picture(above, _channels_last(images[name][index]))
                _depth_map(below, grids[index], span)
                above.set_title(_wrapped(titles[name][index], count), fontsize=9)
    _depth_bar(figure, axes, span, layers)
    return figure


def halting_progress(images: ArrayLike, depth: ArrayLike, layers: int, rows: int = 7) -> Figure:
    """What each layer still computes on: images [B, C, H, W] in which the tokens halted before it are veiled.

    Shows at most ``rows`` layers, from the last that computes all patches of these images (depth [B, N]) to the
    deepest reached, with the share of patches below each picture.
    """
    grids = _grids(depth)
    shown = np.unique(np.linspace(grids.min(), grids.max(), rows).round().astype(int))
    figure, axes = subplots(len(shown), len(images), len(shown) * ((WIDTH - 0.9) / len(images) + 0.22), "compressed")
    for row, layer in zip(axes, shown, strict=True):
        _row_title(row[0], f"layer {layer}")
        for axis, image, grid in zip(row, images, grids, strict=True):
            _picture(axis, _veiled(image, (grid < layer).astype(float)))
            axis.set_xlabel(f"{(grid >= layer).mean():.0%}", labelpad=2, fontsize=9)
    return figure


def depth_by_position(depth: ArrayLike, layers: int) -> Figure:
    """Depth [B, N] averaged over images for each place in the image, and how much it varies between images."""
    grids = _grids(depth)
    mean, spread = grids.mean(axis=0), grids.std(axis=0)
    figure, axes = subplots(1, 2, 3.7)
    left, right = axes[0]
    _depth_map(left, mean, (mean.min(), mean.max()))
    right.imshow(spread, cmap="mako", vmin=0)
    for axis, values, title in ((left, mean, "mean over images"), (right, spread, "standard deviation over images")):
        axis.set_title(title)
        _bare(axis)
        _write_cells(axis, values, "{:.1f}")
    figure.colorbar(left.images[0], ax=left, label=f"depth [layers of {layers}]", shrink=0.85)
    figure.colorbar(right.images[0], ax=right, label="standard deviation [layers]", shrink=0.85)
    class_depth = np.asarray(depth, dtype=float)[:, 0]
    figure.suptitle(f"class token: mean {class_depth.mean():.2f} layers, standard deviation {class_depth.std():.2f}")
    return figure


def tokens_alive(depth: ArrayLike, executed_depth: ArrayLike, layers: int) -> Figure:
    """Share of tokens that each layer computes on, from depth [B, N]: mean over images, band from 10th to 90th percent.

    ``executed_depth`` [B, N] is that of plain inference, which stops an image once its class token has halted.
    """
    figure, axes = subplots(height=3.4)
    axis = axes[0, 0]
    layer = np.arange(1, layers + 1)
    styles = (
        ("every token to its own halting", depth, PALETTE[1], "-"),
        ("plain inference, which ends with the class token", executed_depth, PALETTE[4], "--"),
    )
    for label, values, colour, line in styles:
        alive = (np.asarray(values)[:, None, :] >= layer[:, None]).mean(axis=2)  # [B, L]
        low, high = np.percentile(alive, (10, 90), axis=0)
        axis.fill_between(layer, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.plot(layer, alive.mean(axis=0), line, marker="o", color=colour, label=label)
    axis.set(xlabel="layer", ylabel="tokens computed on", xticks=layer, ylim=(-0.02, 1.04))
    axis.yaxis.set_major_formatter(_percent)
    _legend_above(figure, axis)
    return figure


def halting_scores(scores: ArrayLike, depth: ArrayLike, threshold: float) -> Figure:
    """Mean and quartiles by layer of the halting scores [B, L, N] of active tokens, and of every token's sum so far.

    ``depth`` [B, N] says which tokens are active; a token halts when its sum reaches ``threshold``, and keeps it.
    """
    scores = np.asarray(scores)
    layer = np.arange(1, scores.shape[1] + 1)
    active = np.asarray(depth)[:, None, :] >= layer[:, None]  # [B, L, N]
    sums = scores.cumsum(axis=1)
    figure, axes = subplots(1, 2, 3.3)
    panels = (
        (axes[0, 0], [scores[:, index][active[:, index]] for index in range(len(layer))], "score of active tokens"),
        (axes[0, 1], [sums[:, index].ravel() for index in range(len(layer))], "sum of scores so far, all tokens"),
    )
    for axis, values, label in panels:
        reached = [found if len(found) else np.array([np.nan]) for found in values]
        low, high = np.array([np.percentile(found, (25, 75)) for found in reached]).T
        axis.fill_between(
            layer, low, high, color=PALETTE[1], alpha=0.25, linewidth=0, label="middle half of the tokens"
        )
        axis.plot(layer, [found.mean() for found in reached], marker="o", color=PALETTE[1], label="mean")
        axis.set(xlabel="layer", ylabel=label, xticks=layer)
        axis.set_ylim(bottom=0)
    axes[0, 1].axhline(threshold, color=INK, linewidth=1, linestyle="--", label="threshold of halting")
    _legend_above(figure, axes[0, 1])
    return figure


def depth_by_class(
    mean_depth: ArrayLike, labels: ArrayLike, classes: tuple[str, ...], layers: int, most: int = 20
) -> Figure:
    """Box plots of the mean depth [B] of images, by class, deepest on top; of many classes only the two ends.

    Boxes hold the middle half of the images of a class, whiskers all but 5 percent at either end.
    """
    mean_depth, labels = np.asarray(mean_depth), np.asarray(labels)
    order = sorted(np.unique(labels), key=lambda label: np.median(mean_depth[labels == label]))
    left_out = max(len(order) - most, 0)
    shown = order if not left_out else order[: most // 2] + order[-(most // 2) :]
    figure, axes = subplots(height=1.0 + 0.27 * len(shown))
    axis = axes[0, 0]
    boxes = axis.boxplot(
        [mean_depth[labels == label] for label in shown], orientation="horizontal", whis=(5, 95), widths=0.6,
        showfliers=False, patch_artist=True, medianprops={"color": INK, "linewidth": 1.6},
        whiskerprops={"color": MUTED}, capprops={"color": MUTED}, boxprops={"edgecolor": MUTED},
    )  # fmt: skip
    for box in boxes["boxes"]:
        box.set_facecolor(sns.light_palette(PALETTE[1], 3)[1])
    axis.set_yticks(range(1, len(shown) + 1), [classes[label].replace("_", " ") for label in shown])
    axis.axvline(mean_depth.mean(), color=INK, linewidth=1, linestyle="--", label="mean of all images")
    if left_out:
        axis.axhline(most // 2 + 0.5, color=MUTED, linewidth=1)
        axis.set_title(f"{most // 2} shallowest and {most // 2} deepest of {len(order)} classes")
    axis.set_xlabel(f"mean depth of the image's tokens [layers of {layers}]")
    axis.grid(axis="y", visible=False)
    axis.legend(loc="lower right")
    return figure


def depth_right_wrong(mean_depth: ArrayLike, correct: ArrayLike, layers: int) -> Figure:
    """Distribution of the mean depth [B] of images that are classified right and wrong, each summing to 100 percent."""
    mean_depth, correct = np.asarray(mean_depth), np.asarray(correct)
    figure, axes = subplots(height=3.2)
    axis = axes[0, 0]
    edges = np.histogram_bin_edges(mean_depth, bins=30)
    for name, chosen, colour in (("right", correct, RIGHT), ("wrong", ~correct, WRONG)):
        if chosen.any():
            depths = mean_depth[chosen]
            weights = np.full(len(depths), 1 / len(depths))
            label = f"{name}: {len(depths)} images, mean {depths.mean():.2f} layers"
            axis.hist(depths, edges, weights=weights, color=colour, alpha=0.35, histtype="stepfilled", label=label)
            axis.hist(depths, edges, weights=weights, color=colour, histtype="step", linewidth=1.5)
            axis.axvline(depths.mean(), color=colour, linestyle="--", linewidth=1.2)
    axis.set(xlabel=f"mean depth of the image's tokens [layers of {layers}]", ylabel="share of the images")
    axis.yaxis.set_major_formatter(_percent)
    axis.legend()
    return figure


# --- parts -----------------------------------------------------------------------------------------------------------


# --- time -------------------------------------------------------------------------------------------------------------

SPEED_COLOURS = {"DeiT": PALETTE[0], "A-ViT masked": PALETTE[7], "A-ViT packed": PALETTE[2]}


def speedup_against_flops(sweep: pd.DataFrame) -> Figure:
    """Measured speed-up of packed A-ViT over DeiT against the ratio of their FLOPs, a point a mean depth."""
    figure, [[axis]] = subplots(height=3.8)
    highest = 1.06 * max(sweep["flops_ratio"].max(), sweep["speedup"].max())
    lowest = min(0.9, 0.85 * sweep["speedup"].min())
    axis.plot([1, highest], [1, highest], color=MUTED, linestyle="--", linewidth=1.2)
    axis.annotate("ideal: time follows FLOPs", (0.9 * highest, 0.9 * highest), (-8, 2), textcoords="offset points",
                  ha="right", color=MUTED)  # fmt: skip
    axis.axhline(1, color=PALETTE[7], linewidth=1.2)
    axis.annotate("DeiT", (highest, 1), (-6, 4), textcoords="offset points", ha="right", color=PALETTE[7])
    axis.plot(sweep["flops_ratio"], sweep["speedup"], color=SPEED_COLOURS["A-ViT packed"], marker="o")
    for row in sweep.itertuples():
        axis.annotate(f"{row.mean_depth:g}", (row.flops_ratio, row.speedup), (6, -11), textcoords="offset points")
    axis.set(xlabel="FLOPs of DeiT / FLOPs of A-ViT (beside the points: mean depth in layers)",
             ylabel="images a second, A-ViT / DeiT", ylim=(lowest, highest))  # fmt: skip
    return figure


def throughput_by_batch(table: pd.DataFrame) -> Figure:
    """Images a second against batch size, a line a model; a panel for each task and precision in the table."""
    panels = list(table.groupby(["task", "precision"], sort=False))
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = subplots(rows, columns, 2.9 * rows, sharex=True)
    for axis, ((task, precision), part) in zip(axes.flat, panels, strict=False):
        for model, line in part.groupby("model", sort=False):
            low, high = line["batch"] / line["seconds_high"], line["batch"] / line["seconds_low"]
            axis.fill_between(line["batch"], low, high, color=SPEED_COLOURS[model], alpha=0.2, linewidth=0)
            axis.plot(line["batch"], line["images_per_second"], color=SPEED_COLOURS[model], marker="o", label=model)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(part["batch"].unique()), sorted(part["batch"].unique()))
        axis.set(title=f"{task}, {precision}", ylim=(0, None))
    for axis in axes[-1]:
        axis.set_xlabel("batch size [images]")
    for axis in axes[:, 0]:
        axis.set_ylabel("images a second")
    _legend_above(figure, axes[0, 0])
    return figure


def speedup_by_batch(table: pd.DataFrame) -> Figure:
    """Speed-up over the first model of ``table`` against batch size, a line a model (masked ones dotted)."""
    figure, [[axis]] = subplots(height=3.4)
    reference = table["model"].iloc[0]
    axis.axhline(1, color=MUTED, linewidth=1.2)
    for model, line in table[table["model"] != reference].groupby("model", sort=False):
        style = ":" if "masked" in model else "-"
        axis.plot(line["batch"], line["speedup"], color=model_colour(model), linestyle=style, marker="o", label=model)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(table["batch"].unique()), sorted(table["batch"].unique()))
    axis.minorticks_off()
    axis.set(xlabel="batch size [images]", ylabel=f"images a second / {reference}'s", ylim=(0, None))
    _legend_above(figure, axis)
    return figure


def layer_times(table: pd.DataFrame) -> Figure:
    """Time of every layer, DeiT's and packed A-ViT's, and the tokens that are left in it."""
    figure, [[axis]] = subplots(height=3.4)
    width = 0.38
    axis.bar(table["layer"] - width / 2, table["deit"], width, color=SPEED_COLOURS["DeiT"], label="DeiT")
    axis.bar(table["layer"] + width / 2, table["packed"], width, color=SPEED_COLOURS["A-ViT packed"],
             label="A-ViT packed")  # fmt: skip
    axis.plot(table["layer"], table["ideal"], color=INK, marker="_", markersize=14, linestyle="none", mew=2,
              label="DeiT x share of tokens left")  # fmt: skip
    axis.set(xlabel="layer, and below it the tokens of an image that are left in it", ylabel="time [ms an image]")
    axis.set_xticks(table["layer"], [f"{row.layer}\n{row.tokens:.0f}" for row in table.itertuples()])
    axis.grid(axis="x", visible=False)
    _legend_above(figure, axis)
    return figure


def operator_times(table: pd.DataFrame) -> Figure:
    """Where the time of plain inference goes: a bar a model, stacked by kind of operator."""
    figure, [[axis]] = subplots(height=2.6)
    models = [column for column in table.columns if column != "operators"][::-1]
    left = np.zeros(len(models))
    colours = [PALETTE[0], PALETTE[9], PALETTE[8], PALETTE[1], PALETTE[3]]
    for (_, row), colour in zip(table.iterrows(), colours, strict=False):
        values = row[models].to_numpy(float)
        axis.barh(models, values, left=left, color=colour, label=row["operators"], edgecolor="white")
        left += values
    axis.set(xlabel="time [ms an image]")
    axis.grid(axis="y", visible=False)
    _legend_above(figure, axis)
    return figure


def _grids(depth: ArrayLike) -> np.ndarray:
    """The depth [B, N] of the patch tokens in their places, [B, G, G] float; the class token is left out."""
    patches = np.asarray(depth, dtype=float)[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    return patches.reshape(-1, side, side)


def _channels_last(image: ArrayLike) -> np.ndarray:
    """An image [C, H, W] as RGB [H, W, 3]; grey becomes colour, so that fading and showing know one case only."""
    image = np.clip(np.asarray(image, dtype=float), 0, 1)
    return np.broadcast_to(image.transpose(1, 2, 0), (*image.shape[1:], 3))


def _veiled(image: ArrayLike, veil: np.ndarray, most: float = 0.88) -> np.ndarray:
    """An image [C, H, W] as RGB [H, W, 3], each token covered as far as ``veil`` [G, G] says: 0 not, 1 nearly all."""
    pixels = _channels_last(image)
    patch = pixels.shape[0] // len(veil)
    opacity = most * np.kron(veil, np.ones((patch, patch)))[..., None]
    return (1 - opacity) * pixels + opacity * np.array(VEIL)


def _picture(axis: Axes, pixels: np.ndarray) -> None:
    axis.imshow(pixels)
    _bare(axis)


def _span(grids: np.ndarray) -> tuple[int, int]:
    """The shallowest and the deepest of whole-layer depths [B, G, G]."""
    return int(grids.min()), int(grids.max())


def _depth_map(axis: Axes, grid: np.ndarray, span: tuple[float, float]) -> None:
    """A map of depths [G, G]; the colours run over ``span``, the same for all maps of a figure."""
    axis.imshow(grid, cmap=DEPTH_COLOURS, norm=Normalize(*span))
    _bare(axis)


def _depth_bar(figure: Figure, axes: np.ndarray, span: tuple[int, int], layers: int) -> None:
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


def _bare(axis: Axes) -> None:
    """No ticks, no grid, no frame: for pictures."""
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _row_title(axis: Axes, text: str) -> None:
    axis.set_ylabel(text, rotation=0, ha="right", va="center", labelpad=6)


def _percent(fraction: float, position: int) -> str:
    return f"{100 * fraction:.4g}%"


def _wrapped(text: str, columns: int) -> str:
    """A title broken into lines that fit one of ``columns`` pictures side by side."""
    return textwrap.fill(text.replace("_", " "), max(8, 100 // columns), break_long_words=False)


def _legend_above(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    rows = 1 + sum(len(label) + 7 for label in labels) // 110  # what fits beside each other
    figure.legend(handles, labels, loc="outside upper center", ncols=-(-len(labels) // rows))


def _error(frame: pd.DataFrame, middle: str, low: str, high: str) -> np.ndarray:
    """Lengths [2, rows] of the error bars from the ends of an interval."""
    return np.array([frame[middle] - frame[low], frame[high] - frame[middle]]).clip(min=0)


def _row_percent(confusion: ArrayLike) -> np.ndarray:
    counts = np.asarray(confusion, dtype=float)
    return 100 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)


def _confusion_map(values, classes, label, colours, lowest, highest, number) -> Figure:
    """A heat map of values [K, K]; names up to 30 classes, numbers up to 12."""
    count = len(classes)
    figure, axes = subplots(height=6.2)
    axis = axes[0, 0]
    image = axis.imshow(values, cmap=colours, vmin=lowest, vmax=highest)
    if count <= 30:
        names = [name.replace("_", " ") for name in classes]
        axis.set_xticks(range(count), names, rotation=40, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(count), names)
        axis.tick_params(length=0)
    axis.grid(False)
    axis.set(xlabel="predicted class", ylabel="true class")
    if count <= 12:
        _write_cells(axis, values, number, hide_zero=True)
    figure.colorbar(image, ax=axis, label=label, shrink=0.85)
    return figure


def _write_cells(axis: Axes, values: np.ndarray, number: str, hide_zero: bool = False, most: int = 12) -> None:
    """Write the values of a small heat map into its cells, in the ink that stands out from the colour below."""
    if len(values) > most:
        return
    image = axis.images[0]
    for (row, column), value in np.ndenumerate(values):
        if hide_zero and float(number.format(value)) == 0:
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else INK
        axis.text(column, row, number.format(value), ha="center", va="center", color=ink, fontsize=9)
