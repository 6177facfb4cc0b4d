"""Every chart draws for every kind of study, keeps its labels on the page, and shows what it says."""

import functools

import numpy as np
import pandas as pd
import pytest
from conftest import assert_labels_on_the_page, public_names
from IPython.core.formatters import DisplayFormatter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from avit_lib.study import figures, get_profile
from avit_lib.study.settings import profile_names

STUDIES = {"smoke": (4, 10), "fashion": (12, 10), "caltech256": (12, 256)}  # layers, classes
HELPERS = {"subplots", "model_colour", "percent", "legend_above", "batch_axis", "NotebookFigure"}


@functools.cache
def drawn(layers: int, classes: int) -> dict[str, Figure]:
    """Every figure of the module, on random values."""
    generator = np.random.default_rng(0)
    names = tuple(f"some_class_{number}" for number in range(classes))
    history = pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [2.0, 1.0, 0.5], "val_mean_depth": [6.0, 5.0, 5.0]})
    models = pd.DataFrame({
        "model": ["DeiT", "A-ViT fine-tuned", "ToMe, r = 2"], "gflops_per_image": [1.2, 0.8, 0.7],
        "accuracy": [0.9, 0.8, 0.85], "accuracy_low": [0.88, 0.77, 0.83], "accuracy_high": [0.92, 0.82, 0.87],
    })  # fmt: skip
    points = models[1:2].assign(model="A-ViT fine-tuned, depth 4")
    before, after = generator.random((2, classes))
    changes = pd.DataFrame({"class": names, "images": 9, "before": before, "after": after, "change": after - before})
    confusion = generator.integers(0, 50, (classes, classes))
    speeds = pd.DataFrame([
        {"task": task, "precision": "float32", "batch": batch, "model": model, "images_per_second": 10.0,
         "images_per_second_low": 9.0, "images_per_second_high": 12.0}
        for task in ("inference", "training") for batch in (1, 256) for model in figures.SPEED_COLOURS
    ])  # fmt: skip
    sweep = pd.DataFrame({"mean_depth": [3.0, 11.0], "flops_ratio": [3.5, 1.1], "speedup": [3.0, 0.8]})
    layer_times = pd.DataFrame({"layer": np.arange(1, layers + 1), "tokens": 50.0, "deit": 1.0, "packed": 0.5})
    return {
        "learning_curves": figures.learning_curves(
            {"DeiT": history[["epoch", "train_loss"]], "A-ViT": history},
            {"train_loss": "loss", "val_mean_depth": "depth [layers]"},
        ),
        "confusion_map": figures.confusion_map(confusion, names, "images [%]", "Blues", (0, 50)),
        "accuracy_against": figures.accuracy_against(models, "gflops_per_image", "GFLOPs", points=points),
        "class_change": figures.class_change(changes.sort_values("change"), ("DeiT", "A-ViT")),
        "speedup_against_flops": figures.speedup_against_flops(sweep),
        "throughput_by_batch": figures.throughput_by_batch(speeds),
        "layer_times": figures.layer_times(layer_times.assign(ideal=0.4)),
    }


@pytest.mark.parametrize("study", STUDIES)
def test_every_figure_draws_with_its_labels_on_the_page(study):
    assert_labels_on_the_page(drawn(*STUDIES[study]))


def test_the_module_has_no_figure_that_is_not_tested_above():
    assert public_names(figures) == {*drawn(*STUDIES["smoke"]), *HELPERS}


def texts(labels) -> list[str]:
    return [label.get_text() for label in labels]


def test_a_model_without_a_column_has_no_line_in_its_panel():
    loss, depth = drawn(*STUDIES["smoke"])["learning_curves"].axes
    assert [line.get_label() for line in loss.lines] == ["DeiT", "A-ViT"]
    assert [line.get_label() for line in depth.lines] == ["A-ViT"]
    np.testing.assert_array_equal(depth.lines[0].get_xydata(), [(1, 6), (2, 5), (3, 5)])


@pytest.mark.parametrize(("classes", "named", "numbered"), [(3, 3, True), (20, 20, False), (40, 0, False)])
def test_a_confusion_map_has_the_true_class_in_rows_and_as_much_text_as_fits(classes, named, numbered):
    values = np.zeros((classes, classes))
    values[0, 1], values[2, 2] = 75, 0.04  # a class 0 that is taken for class 1
    names = tuple(f"class_{number}" for number in range(classes))
    axis = figures.confusion_map(values, names, "images [%]", "Blues", (0, 100)).axes[0]
    np.testing.assert_array_equal(np.reshape(axis.collections[0].get_array(), values.shape), values)
    assert axis.yaxis_inverted() and axis.get_ylabel() == "true class" and axis.get_xlabel() == "predicted class"
    ticks = texts(axis.get_yticklabels()), texts(axis.get_xticklabels())
    assert ticks == ([f"class {number}" for number in range(named)],) * 2
    assert [text for text in texts(axis.texts) if text] == ["75"] * numbered  # nothing for what rounds to 0


def test_accuracy_stands_with_its_interval_and_merged_models_on_a_curve():
    table = pd.DataFrame({
        "model": ["DeiT", "ToMe, r = 4", "ToMe, r = 2"], "speedup": [1.0, 1.5, 1.2], "accuracy_macro": [0.9, 0.8, 0.85],
        "accuracy_macro_low": [0.88, 0.7, 0.8], "accuracy_macro_high": [0.93, 0.9, 0.9],
    })  # fmt: skip
    points = table[:2].assign(model=["A-ViT fine-tuned, depth 4", "A-ViT fine-tuned"])
    axis = figures.accuracy_against(table, "speedup", "speed-up", "accuracy_macro", points).axes[0]
    merged, turned = (line for line in axis.lines if line.get_label() in ("ToMe, by r", "A-ViT fine-tuned, by beta"))
    np.testing.assert_allclose(merged.get_xydata(), [(1.2, 0.85), (1.5, 0.8)])
    np.testing.assert_allclose(turned.get_xydata(), [(1.0, 0.9), (1.5, 0.8)])
    (point,) = axis.containers  # of DeiT
    np.testing.assert_allclose(point.lines[2][0].get_segments()[0], [(1, 0.88), (1, 0.93)])
    assert axis.get_ylabel() == "accuracy, mean over classes" and axis.get_xlabel() == "speed-up"


def test_models_keep_their_colours():
    colours = [figures.model_colour(label) for label in ("DeiT", "A-ViT", "A-ViT fine-tuned")]
    assert len(set(colours)) == 3
    assert figures.model_colour("DeiT-T") == colours[0] and figures.model_colour("A-ViT-T fine-tuned") == colours[2]


@pytest.mark.parametrize("profile", sorted({*profile_names()} - {"imagenet"}))
def test_the_models_of_a_profile_have_colours_of_their_own(profile):
    labels = [run.label for run in get_profile(profile).runs]
    assert len({figures.model_colour(label) for label in (*labels, "ToMe, r = 8")}) == len(labels) + 1


def test_classes_that_lose_and_gain_most_are_shown():
    changes = pd.DataFrame({
        "class": ["ant", "bee", "cat", "my_dog"], "images": 4, "before": [1.0, 0.75, 0.5, 0.5],
        "after": [0.0, 0.5, 0.5, 1.0], "change": [-1.0, -0.25, 0.0, 0.5],
    })  # fmt: skip
    axis = figures.class_change(changes, ("DeiT", "A-ViT"), 1).axes[0]
    assert texts(axis.get_yticklabels()) == ["my dog (4)", "ant (4)"]
    before, after = axis.collections[1:3]
    np.testing.assert_array_equal(before.get_offsets(), [(0.5, 0), (1, 1)])
    np.testing.assert_array_equal(after.get_offsets(), [(1, 0), (0, 1)])
    assert [to_rgb(points.get_facecolor()[0]) for points in (before, after)] == [
        to_rgb(figures.model_colour(name)) for name in ("DeiT", "A-ViT")
    ]


def test_a_figure_draws_when_no_class_changes():
    nothing = pd.DataFrame({"class": ["ant"], "images": 4, "before": 1.0, "after": 1.0, "change": 0.0})
    axis = figures.class_change(nothing, ("DeiT", "A-ViT")).axes[0]
    FigureCanvasAgg(axis.figure).draw()
    assert texts(axis.get_yticklabels()) == []


def test_throughput_has_a_panel_for_each_task_and_precision():
    figure = drawn(*STUDIES["smoke"])["throughput_by_batch"]
    assert [axis.get_title() for axis in figure.axes] == ["inference, float32", "training, float32"]
    for axis in figure.axes:
        assert [line.get_label() for line in axis.lines] == list(figures.SPEED_COLOURS)
        assert texts(axis.get_xticklabels()) == ["1", "256"] and axis.get_xscale() == "log"


def test_a_notebook_shows_a_figure_as_png_without_pyplot():
    formatter = DisplayFormatter()
    formats, _ = formatter.format(figures.subplots()[0], include={"image/png"})
    assert formats["image/png"].startswith(b"\x89PNG")
