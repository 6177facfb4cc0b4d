"""Every chart draws for every kind of study, keeps its labels on the page, and shows what it
says.
"""

import functools

import numpy as np
import pandas as pd
import pytest
from conftest import assert_labels_on_the_page, public_names
from IPython.core.formatters import DisplayFormatter
from matplotlib.figure import Figure

from avit_lib.study import figures, get_profile
from avit_lib.study.settings import profile_names

LAYERS = (4, 12)
HELPERS = {
    "label_points",
    "subplots",
    "model_colour",
    "percent",
    "legend_above",
    "curve",
    "batch_axis",
    "NotebookFigure",
    "legible",
}


@functools.cache
def drawn(layers: int) -> dict[str, Figure]:
    """Every figure of the module, on values made up."""
    history = pd.DataFrame(
        {"epoch": [1, 2, 3], "train_loss": [2.0, 1.0, 0.5], "val_mean_depth": [6.0, 5.0, 5.0]}
    )
    models = pd.DataFrame(
        {
            "model": ["DeiT", "A-ViT fine-tuned", "ToMe, r = 2"],
            "gflops_per_image": [1.2, 0.8, 0.7],
            "accuracy": [0.9, 0.8, 0.85],
            "accuracy_low": [0.88, 0.77, 0.83],
            "accuracy_high": [0.92, 0.82, 0.87],
        }
    )
    models = models.assign(mean_depth=[12, 7, np.nan], flops_saved=[0, 0.4, 0.3])
    points = models[1:2].assign(model="A-ViT fine-tuned, depth 4", mean_depth=4)
    speeds = pd.DataFrame(
        [
            {
                "task": task,
                "precision": "float32",
                "batch": batch,
                "model": model,
                "images_per_second": 10.0,
                "images_per_second_low": 9.0,
                "images_per_second_high": 12.0,
            }
            for task in ("inference", "training")
            for batch in (1, 256)
            for model in figures.SPEED_COLOURS
        ]
    )
    sweep = pd.DataFrame(
        {"mean_depth": [3.0, 11.0], "flops_ratio": [3.5, 1.1], "speedup": [3.0, 0.8]}
    )
    sweep = sweep.assign(speedup_low=0.9 * sweep["speedup"], speedup_high=1.1 * sweep["speedup"])
    layer_times = pd.DataFrame(
        {"layer": np.arange(1, layers + 1), "tokens": 50.0, "deit": 1.0, "packed": 0.5}
    )
    return {
        "learning_curves": figures.learning_curves(
            {"DeiT": history[["epoch", "train_loss"]], "A-ViT": history},
            {"train_loss": "loss", "val_mean_depth": "depth [layers]"},
        ),
        "accuracy_against": figures.accuracy_against(
            models, "gflops_per_image", "GFLOPs", points=points
        ),
        "speedup_against_flops": figures.speedup_against_flops(sweep),
        "throughput_by_batch": figures.throughput_by_batch(speeds),
        "layer_times": figures.layer_times(layer_times.assign(ideal=0.4)),
    }


@pytest.mark.parametrize("layers", LAYERS)
def test_every_figure_draws_with_its_labels_on_the_page(layers):
    assert_labels_on_the_page(drawn(layers))


def test_the_module_has_no_figure_that_is_not_tested_above():
    assert public_names(figures) == {*drawn(LAYERS[0]), *HELPERS}


def texts(labels) -> list[str]:
    return [label.get_text() for label in labels]


def test_a_model_without_a_column_has_no_line_in_its_panel():
    loss, depth = drawn(LAYERS[0])["learning_curves"].axes
    assert [line.get_label() for line in loss.lines] == ["DeiT", "A-ViT"]
    assert [line.get_label() for line in depth.lines] == ["A-ViT"]
    np.testing.assert_array_equal(depth.lines[0].get_xydata(), [(1, 6), (2, 5), (3, 5)])


def test_accuracy_stands_with_its_interval_and_merged_models_on_a_curve():
    table = pd.DataFrame(
        {
            "model": ["DeiT", "ToMe, r = 4", "ToMe, r = 2"],
            "speedup": [1.0, 1.5, 1.2],
            "accuracy_macro": [0.9, 0.8, 0.85],
            "accuracy_macro_low": [0.88, 0.7, 0.8],
            "accuracy_macro_high": [0.93, 0.9, 0.9],
            "mean_depth": [12, np.nan, np.nan],
            "flops_saved": [0, 0.5, 0.3],
        }
    )
    points = table[:2].assign(
        model=["A-ViT fine-tuned, depth 4", "A-ViT fine-tuned"], mean_depth=[4.02, 6.5]
    )
    table.loc[3] = ["Adaptive merging, 44% saved", 1.4, 0.85, 0.8, 0.9, 6.8, 0.441]
    table.loc[4] = ["Adaptive merging, 55% saved", 1.6, 0.85, 0.8, 0.9, 5.8, 0.553]
    axis = figures.accuracy_against(table, "speedup", "speed-up", "accuracy_macro", points).axes[0]
    merged, turned = (
        line
        for line in axis.lines
        if line.get_label() in ("ToMe, by r", "A-ViT fine-tuned, by mean depth")
    )
    np.testing.assert_allclose(merged.get_xydata(), [(1.2, 0.85), (1.5, 0.8)])
    np.testing.assert_allclose(turned.get_xydata(), [(1.0, 0.9), (1.5, 0.8)])
    intervals = [segment for bars in axis.collections for segment in bars.get_segments()]
    assert len(intervals) == 7 and [(1, 0.88), (1, 0.93)] in [
        list(map(tuple, segment)) for segment in intervals
    ]
    assert sorted(texts(axis.texts)) == ["2", "4", "4.0", "44%", "55%", "6.5"]
    assert axis.get_ylabel() == "accuracy, mean over classes" and axis.get_xlabel() == "speed-up"


def test_words_beside_crowded_points_cover_neither_each_other_nor_a_point():
    names = [
        f"{model}, depth {depth}" for model in ("A-ViT", "A-ViT fine-tuned") for depth in (7, 6)
    ]
    place = pd.DataFrame({"speedup": [1.2, 1.6, 1.21, 1.61], "accuracy": [0.9, 0.85, 0.895, 0.845]})
    place = place.assign(model=names, mean_depth=7.0, flops_saved=0.4)
    place = place.assign(
        accuracy_low=place["accuracy"] - 0.05, accuracy_high=place["accuracy"] + 0.05
    )
    figure = figures.accuracy_against(place, "speedup", "speed-up")
    axis = figure.axes[0]
    boxes = [words.get_window_extent() for words in axis.texts]
    points = axis.transData.transform(place[["speedup", "accuracy"]])
    assert len(boxes) == 4
    for number, box in enumerate(boxes):
        assert box.count_contains(points) == box.count_overlaps(boxes[:number]) == 0


def test_words_keep_off_the_lines_where_there_is_room():
    sweep = pd.DataFrame(
        {"mean_depth": [10.8, 3.0], "flops_ratio": [1.2, 3.5], "speedup": [1.1, 3.3]}
    )
    figure = figures.speedup_against_flops(
        sweep.assign(speedup_low=sweep["speedup"], speedup_high=sweep["speedup"])
    )
    axis = figure.axes[0]
    deit = axis.transData.transform((1.2, 1.0))[1]
    for words in axis.texts:
        assert not words.get_window_extent().y0 <= deit <= words.get_window_extent().y1


def test_models_keep_their_colours():
    labels = [
        "DeiT",
        "DeiT trained longer",
        "ToMe, r = 8",
        "Adaptive merging, 44% saved",
        "Adaptive merging trained",
    ]
    labels += [
        "A-ViT from the published start",
        "A-ViT from ImageNet",
        "A-ViT halting held",
        "A-ViT halting trained",
    ]
    colours = {label: figures.model_colour(label) for label in labels}
    assert len(set(colours.values())) == len(labels)
    alike = {
        "DeiT-T": "DeiT",
        "A-ViT-T halting trained": "A-ViT halting trained",
        "ToMe": "ToMe, r = 8",
    }
    alike |= {
        "A-ViT-T": "A-ViT from the published start",
        "A-ViT halting held, depth 6": "A-ViT halting held",
    }
    assert {label: figures.model_colour(label) for label in alike} == {
        a: colours[b] for a, b in alike.items()
    }


@pytest.mark.parametrize("profile", sorted({*profile_names()} - {"imagenet"}))
def test_the_models_of_a_profile_have_colours_of_their_own(profile):
    labels = [run.label for run in get_profile(profile).runs]
    assert (
        len({figures.model_colour(label) for label in (*labels, "ToMe, r = 8")}) == len(labels) + 1
    )


def test_throughput_has_a_panel_for_each_task_and_precision():
    figure = drawn(LAYERS[0])["throughput_by_batch"]
    assert [axis.get_title() for axis in figure.axes] == ["inference, float32", "training, float32"]
    for axis in figure.axes:
        assert [line.get_label() for line in axis.lines] == list(figures.SPEED_COLOURS)
        assert texts(axis.get_xticklabels()) == ["1", "256"] and axis.get_xscale() == "log"


def test_a_notebook_shows_a_figure_as_png_without_pyplot():
    formatter = DisplayFormatter()
    formats, _ = formatter.format(figures.subplots()[0], include={"image/png"})
    assert formats["image/png"].startswith(b"\x89PNG")
