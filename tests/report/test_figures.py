"""Every chart keeps its labels on the page, shows what it says, and covers no point with words."""

import numpy as np
import pandas as pd
from conftest import assert_on_the_page
from IPython.core.formatters import DisplayFormatter

from avit_lib.report import figures


def evaluated(**columns):
    """An evaluation table of models with these columns, and what all have."""
    table = pd.DataFrame({"mean_depth": 7.0, "flops_saved": 0.4, **columns})
    ends = {"accuracy_low": table["accuracy"] - 0.1, "accuracy_high": table["accuracy"] + 0.1}
    return table.assign(**ends)


def test_accuracy_stands_with_its_interval_and_models_of_a_kind_on_a_curve():
    table = evaluated(
        model=["DeiT", "ToMe, r = 4", "ToMe, r = 2", *(f"Adaptive merging, {n}" for n in "ab")],
        accuracy=[0.9, 0.8, 0.85, 0.85, 0.8],
        flops_saved=[0, 0.5, 0.3, 0.441, 0.553],
    )
    points = evaluated(model=["A-ViT, depth 4", "A-ViT"], accuracy=[0.7, 0.9], mean_depth=[4.02, 6])
    figure = figures.accuracy_against(table, "flops_saved", "FLOPs saved", points=points)
    assert_on_the_page(figure)
    (axis,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert lines["ToMe, by r"] == [[0.3, 0.85], [0.5, 0.8]]
    bars = [segment.tolist() for part in axis.collections for segment in part.get_segments()]
    assert len(bars) == 7 and [[0, 0.8], [0, 1.0]] in bars
    words = sorted(text.get_text() for text in axis.texts)
    assert words == ["2", "4", "4.0", "44%", "55%", "6.0"]


def test_words_beside_crowded_points_cover_neither_each_other_nor_a_point():
    names = [f"{model}, depth {depth}" for model in ("A-ViT", "DeiT") for depth in (7, 6)]
    place = {"speedup": [1.2, 1.6, 1.21, 1.61], "accuracy": [0.9, 0.85, 0.895, 0.845]}
    figure = figures.accuracy_against(evaluated(model=names, **place), "speedup", "speed-up")
    (axis,) = figure.axes
    points = axis.transData.transform(np.transpose([*place.values()]))
    boxes = [words.get_window_extent() for words in axis.texts]
    assert len(boxes) == 4
    for number, box in enumerate(boxes):
        assert box.count_contains(points) == box.count_overlaps(boxes[:number]) == 0


def test_a_notebook_shows_a_figure_as_png_without_pyplot():
    shown, _ = DisplayFormatter().format(figures.subplots()[0], include={"image/png"})
    assert shown["image/png"].startswith(b"\x89PNG")
