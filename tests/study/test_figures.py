"""Every figure draws for every kind of study, keeps its labels on the page, and shows what it says."""

import functools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from avit_lib import plots
from avit_lib.config import get_profile

# (patches a side, pixels a side, channels, layers, classes)
STUDIES = {
    "smoke": (4, 28, 1, 4, 10),
    "fashion": (7, 28, 1, 12, 10),
    "caltech256": (14, 56, 3, 12, 256),
}


@functools.cache
def figures(side: int, pixels: int, channels: int, layers: int, classes: int) -> dict[str, Figure]:
    """Every figure of the module, on random values."""
    generator = np.random.default_rng(0)
    names = tuple(f"some_class_{number}" for number in range(classes))
    images = generator.random((6, channels, pixels, pixels))
    depth = generator.integers(1, layers + 1, (600, 1 + side**2))
    labels = np.arange(600) % classes
    mean_depth, correct = depth.mean(axis=1), generator.random(600) < 0.9
    scores = generator.random((600, layers, depth.shape[1])) / layers
    history = pd.DataFrame({"epoch": [1, 2, 3], "train_loss": [2.0, 1.0, 0.5], "val_mean_depth": [6.0, 5.0, 5.0]})
    groups = pd.DataFrame({"mean_depth": [2.0, 3.0], "accuracy": [0.9, 1.0], "low": [0.8, 0.9], "high": [0.95, 1.0]})
    models = pd.DataFrame({
        "model": ["DeiT", "A-ViT", "A-ViT fine-tuned"], "gflops_per_image": [1.2, 0.8, 0.7],
        "accuracy": [0.9, 0.8, 0.85], "accuracy_low": [0.88, 0.77, 0.83], "accuracy_high": [0.92, 0.82, 0.87],
    })  # fmt: skip
    speedups = models.assign(speedup=[1.0, 1.5, 1.6], model=["DeiT", "A-ViT fine-tuned", "ToMe, r = 2"])
    points = speedups[1:2].assign(model="A-ViT fine-tuned, depth 4")
    before, after = generator.random((2, classes))
    changes = pd.DataFrame({"class": names, "images": 9, "before": before, "after": after, "change": after - before})
    confusion = generator.integers(0, 50, (classes, classes))
    speeds = pd.DataFrame([
        {"task": task, "precision": "float32", "batch": batch, "model": model, "seconds": 0.1 * batch,
         "seconds_low": 0.09 * batch, "seconds_high": 0.12 * batch, "images_per_second": 10.0, "speedup": 1.0}
        for task in ("inference", "training") for batch in (1, 256) for model in plots.SPEED_COLOURS
    ])  # fmt: skip
    sweep = pd.DataFrame({"mean_depth": [3.0, 11.0], "flops_ratio": [3.5, 1.1], "speedup": [3.0, 0.8]})
    layer_times = pd.DataFrame({"layer": np.arange(1, layers + 1), "tokens": 50.0, "deit": 1.0, "packed": 0.5})
    kinds = pd.DataFrame({"operators": ["linear layers", "all else"], "DeiT": [2.0, 1.0], "A-ViT packed": [1.0, 1.0]})
    pair = {"shallowest": slice(0, 4), "deepest": slice(2, 6)}
    return {
        "sample_grid": plots.sample_grid(images, labels[:6] // 2, names),
        "learning_curves": plots.learning_curves(
            {"DeiT": history[["epoch", "train_loss"]], "A-ViT": history},
            {"train_loss": "loss", "val_mean_depth": "depth [layers]"},
        ),
        "halting_distributions": plots.halting_distributions(
            {"A-ViT": np.full(layers, 1 / layers), "A-ViT fine-tuned": np.eye(layers)[1]}, np.full(layers, 1 / layers)
        ),
        "confusion_matrix": plots.confusion_matrix(confusion, names),
        "confusion_change": plots.confusion_change(confusion, confusion.T, names),
        "accuracy_by_depth": plots.accuracy_by_depth(groups, layers),
        "accuracy_against_flops": plots.accuracy_against_flops(models),
        "accuracy_against_speed": plots.accuracy_against_speed(speedups, points),
        "class_change": plots.class_change(changes.sort_values("change"), ("DeiT", "A-ViT")),
        "depth_maps": plots.depth_maps(images, depth[:6], layers, list(names[:6])),
        "depth_extremes": plots.depth_extremes(
            {name: images[part] for name, part in pair.items()}, {name: depth[part] for name, part in pair.items()},
            layers, {name: list(names[part]) for name, part in pair.items()},
        ),
        "halting_progress": plots.halting_progress(images[:3], depth[:3], layers),
        "depth_by_position": plots.depth_by_position(depth, layers),
        "tokens_alive": plots.tokens_alive(depth, np.minimum(depth, depth[:, :1]), layers),
        "halting_scores": plots.halting_scores(scores, depth, 0.99),
        "depth_by_class": plots.depth_by_class(mean_depth, labels, names, layers),
        "speedup_by_batch": plots.speedup_by_batch(speeds[speeds["task"] == "inference"]),
        "throughput_by_batch": plots.throughput_by_batch(speeds),
        "speedup_against_flops": plots.speedup_against_flops(sweep),
        "layer_times": plots.layer_times(layer_times.assign(ideal=0.4)),
        "operator_times": plots.operator_times(kinds),
        "depth_right_wrong": plots.depth_right_wrong(mean_depth, correct, layers),
    }  # fmt: skip


@pytest.mark.parametrize("study", STUDIES)
def test_every_figure_draws_with_its_labels_on_the_page(study):
    for name, figure in figures(*STUDIES[study]).items():
        FigureCanvasAgg(figure).draw()
        page, drawn = figure.bbox_inches, figure.get_tightbbox()
        assert drawn.x0 > -0.05 and drawn.y0 > -0.05, f"{name} is cut off at the left or bottom: {drawn}"
        assert drawn.x1 < page.x1 + 0.05 and drawn.y1 < page.y1 + 0.05, f"{name} is cut off: {drawn} on {page}"
        assert figure.get_figwidth() == plots.WIDTH, name
    assert plt.get_fignums() == [], "pyplot knows a figure, so a notebook would show it twice"


def test_the_module_has_no_figure_that_is_not_tested_above():
    public = {name for name, value in vars(plots).items() if callable(value) and value.__module__ == plots.__name__}
    made = figures(*STUDIES["smoke"])
    assert {name for name in public if not name.startswith("_")} == {
        *made,
        "subplots",
        "model_colour",
        "NotebookFigure",
    }


def test_depth_has_the_same_colour_in_every_map_of_a_figure():
    images, depth = np.zeros((2, 1, 28, 28)), np.full((2, 50), 5)
    depth[0, 1], depth[1, 2], depth[:, 0] = 4, 9, 12  # the class token is not shown
    figure = plots.depth_maps(images, depth, layers=12)
    maps = [axis.images[0] for axis in figure.axes if axis.images and axis.images[0].get_array().shape == (7, 7)]
    assert len(maps) == 2
    assert {(image.norm.vmin, image.norm.vmax, image.cmap.name) for image in maps} == {(4, 9, plots.DEPTH_COLOURS)}


def test_maps_show_patches_in_reading_order_without_the_class_token():
    depth = np.concatenate([[[9]], np.arange(1, 17)[None]], axis=1)
    figure = plots.depth_maps(np.zeros((1, 1, 28, 28)), depth, layers=16)
    shown = next(axis.images[0] for axis in figure.axes if axis.images and axis.images[0].get_array().shape == (4, 4))
    np.testing.assert_array_equal(shown.get_array(), np.arange(1, 17).reshape(4, 4))


def test_progress_veils_exactly_the_tokens_that_have_halted():
    images = np.ones((1, 3, 28, 28))
    depth = np.array([[4, 1, 2, 3, 4]])  # a class token and 2 x 2 patches
    figure = plots.halting_progress(images, depth, layers=4)
    untouched = [axis.images[0].get_array()[[0, 0, -1, -1], [0, -1, 0, -1], 0] == 1 for axis in figure.axes]
    np.testing.assert_array_equal(untouched, [[True] * 4, [False, True, True, True], [False, False, True, True],
                                              [False, False, False, True]])  # fmt: skip


def test_fading_needs_no_spread_of_depth():
    figure = plots.depth_maps(np.ones((1, 1, 28, 28)), np.full((1, 17), 3), layers=4)
    assert np.isfinite(figure.axes[2].images[0].get_array()).all()


def test_confusion_is_a_percentage_of_the_true_class():
    figure = plots.confusion_matrix(np.array([[3, 1], [0, 0]]), ("seen", "absent"))
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[75, 25], [0, 0]])


def test_scores_of_halted_tokens_are_left_out():
    scores = np.zeros((1, 3, 2))
    scores[0, 0], scores[0, 1, 0] = (0.2, 1.0), 0.8  # the second token halts in the first layer
    figure = plots.halting_scores(scores, np.array([[2, 1]]), 0.99)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [0.6, 0.8, np.nan])
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), [0.6, 1.0, 1.0])


def test_alive_is_the_share_of_tokens_of_at_least_that_depth():
    figure = plots.tokens_alive(np.array([[3, 1, 2, 3]]), np.array([[3, 1, 2, 3]]), layers=3)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [1, 0.75, 0.5])


def test_right_and_wrong_draws_when_nothing_is_wrong():
    figure = plots.depth_right_wrong(np.array([2.0, 3.0]), np.array([True, True]), layers=4)
    FigureCanvasAgg(figure).draw()
    assert len(figure.axes[0].get_legend().get_texts()) == 1


def test_models_keep_their_colours():
    colours = [plots.model_colour(label) for label in ("DeiT", "A-ViT", "A-ViT fine-tuned")]
    assert len(set(colours)) == 3
    assert plots.model_colour("DeiT-T") == colours[0] and plots.model_colour("A-ViT-T fine-tuned") == colours[2]
    labels = [run.label for run in get_profile("caltech101").runs]
    assert len({plots.model_colour(label) for label in (*labels, "ToMe, r = 8")}) == len(labels) + 1


def test_classes_that_lose_and_gain_most_are_shown():
    changes = pd.DataFrame({
        "class": ["ant", "bee", "cat", "dog"], "images": 4, "before": [1.0, 0.75, 0.5, 0.5],
        "after": [0.0, 0.5, 0.5, 1.0], "change": [-1.0, -0.25, 0.0, 0.5],
    })  # fmt: skip
    shown = [tick.get_text() for tick in plots.class_change(changes, ("DeiT", "A-ViT"), 1).axes[0].get_yticklabels()]
    assert shown == ["dog (4)", "ant (4)"]


def test_a_notebook_shows_a_figure_as_png_without_pyplot():
    formatter = DisplayFormatter()
    formats, _ = formatter.format(plots.subplots()[0], include={"image/png"})
    assert formats["image/png"].startswith(b"\x89PNG")
