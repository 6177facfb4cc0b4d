"""Pictures of tokens: each draws for every kind of study, and shows every patch in its place."""

import functools

import numpy as np
import pytest
from conftest import assert_labels_on_the_page, public_names
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from avit_lib.study import pictures

# (images, patches a side, pixels a side, layers)
STUDIES = {"smoke": (4, 4, 64, 12), "caltech24": (6, 14, 224, 12)}
HELPERS = {"mosaic", "bare", "grids", "coloured", "rgb", "veiled"}


@functools.cache
def drawn(count: int, side: int, pixels: int, layers: int) -> dict[str, Figure]:
    """Every picture of the module, on random values."""
    generator = np.random.default_rng(0)
    images = generator.random((count, 3, pixels, pixels))
    depth = generator.integers(1, layers + 1, (count, 1 + side**2))
    names = tuple(f"some_class_{number} 7.5" for number in range(count))
    groups = {
        name: (images[part], depth[part], list(names[part]))
        for name, part in {
            "shallowest": slice(0, 8),
            "widest spread": slice(count // 2, count),
        }.items()
    }
    beside = {
        "one\nstart": (depth, [f"AUC 0.{number}" for number in range(count)]),
        "another\nstart": (depth[::-1], []),
    }
    return {
        "samples": pictures.samples(images, np.arange(count) % 4, names),
        "depth_maps": pictures.depth_maps(images, depth, layers, list(names)),
        "depths_beside": pictures.depths_beside(images, list(names), beside, layers, columns=3),
        "depth_extremes": pictures.depth_extremes(groups, layers),
        "halting_progress": pictures.halting_progress(images, depth),
    }


@pytest.mark.parametrize("study", STUDIES)
def test_every_picture_draws_with_its_labels_on_the_page(study):
    assert_labels_on_the_page(drawn(*STUDIES[study]))


def test_the_module_has_no_picture_that_is_not_tested_above():
    assert public_names(pictures) == {*drawn(*STUDIES["smoke"]), *HELPERS}


def rows(figure: Figure) -> dict[str, list[Axes]]:
    """The pictures of a figure by the name of their row; a row without one is called by the number
    of its first.
    """
    found = {}
    for number, axis in enumerate(axis for axis in figure.axes if axis.images):
        if axis.get_subplotspec().colspan.start == 0:
            row = found.setdefault(axis.get_ylabel() or number, [])
        row.append(axis)
    return found


def shown(axis: Axes) -> np.ndarray:
    return axis.images[0].get_array()


def test_maps_show_patches_in_reading_order_without_the_class_token():
    depth = np.concatenate([[[99]], np.arange(1, 17)[None]], axis=1)
    (axis,) = rows(pictures.depth_maps(np.zeros((1, 3, 28, 28)), depth, layers=16))["depth"]
    np.testing.assert_array_equal(
        shown(axis), pictures.coloured(np.arange(1, 17).reshape(4, 4), 16)
    )
    assert (
        shown(axis).sum(axis=-1).argmax() == 15 and shown(axis).sum(axis=-1).argmin() == 0
    )  # bright: went deep


@pytest.mark.parametrize("figure", ["depth_maps", "depths_beside", "depth_extremes"])
def test_depth_has_the_same_colour_in_every_map_of_a_figure_and_in_its_key(figure):
    images, depth = np.zeros((2, 3, 28, 28)), np.full((2, 50), 5)
    depth[0, 1], depth[1, 2], depth[:, 0] = 4, 9, 12  # the class token is not shown
    if figure == "depth_maps":
        drawing = pictures.depth_maps(images, depth, layers=12)
    elif figure == "depths_beside":
        beside = {name: (depth[[number]], []) for number, name in enumerate(("one", "other"))}
        drawing = pictures.depths_beside(images[:1], ["title"], beside, layers=12)
    else:
        groups = {
            name: (images[part], depth[part], ["title"])
            for name, part in {"one": slice(0, 1), "other": slice(1, 2)}.items()
        }
        drawing = pictures.depth_extremes(groups, layers=12)
    first, second = (
        shown(axis) for axis in drawing.axes if axis.images and shown(axis).shape == (7, 7, 3)
    )
    np.testing.assert_array_equal(first[1:], second[1:])
    np.testing.assert_array_equal(first[0, :3], pictures.coloured(np.array([4, 5, 5]), 12))
    np.testing.assert_array_equal(second[0, :3], pictures.coloured(np.array([5, 9, 5]), 12))
    FigureCanvasAgg(drawing).draw()
    (key,) = (axis for axis in drawing.axes if axis.get_xlabel() == "depth [layers of 12]")
    assert [label.get_text() for label in key.get_xticklabels()] == [
        str(layer) for layer in range(1, 13)
    ]
    colours = key.collections[-1].cmap(key.collections[-1].norm([4, 5, 9]))
    np.testing.assert_allclose(colours[:, :3], [first[0, 0], first[0, 1], second[0, 1]], atol=0.01)


def test_maps_of_images_that_are_not_square_keep_their_shape():
    depth = np.concatenate([[99], np.arange(1, 129)])[None]
    images = np.random.default_rng(0).random((1, 3, 32, 64))
    expected = pictures.coloured(np.arange(1, 129).reshape(1, 8, 16), 128)[0]
    extremes = pictures.depth_extremes({"x": (images, depth, [])}, 128)
    beside = pictures.depths_beside(images, ["title"], {"depth": (depth, [])}, 128)
    for figure in (pictures.depth_maps(images, depth, 128), beside, extremes):
        (axis,) = rows(figure)["depth"]
        np.testing.assert_array_equal(shown(axis), expected)
        FigureCanvasAgg(figure).draw()
    last = shown(rows(pictures.halting_progress(images, depth))["layer 128"][0])
    unveiled = (last == pictures.rgb(images)[0]).all(axis=-1)
    assert unveiled[28:, 60:].all() and unveiled.sum() == 16  # the last patch, of 4 x 4 pixels


def test_a_grid_is_given_or_follows_from_the_images_or_is_square():
    depth = np.arange(145)[None]
    assert pictures.grids(depth, (6, 24))[0, 0, -1] == 24
    assert pictures.grids(depth).shape == (1, 12, 12)
    assert pictures.grids(depth, (48, 192)).shape == (1, 6, 24)
    with pytest.raises(ValueError, match="reshape"):
        pictures.grids(np.ones((121, 129)))  # 128 patches are no square
    figure = pictures.depth_maps(np.zeros((1, 1, 96, 96)), depth, 144, grid=(6, 24))
    assert shown(rows(figure)["depth"][0]).shape == (6, 24, 3)


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("cost $5 and $6.jpg", "cost $5 and $6.jpg"),
        (r"bad$\foo$.jpg", r"bad$\foo$.jpg"),
        ("caf\udce9.jpg", r"caf\udce9.jpg"),  # as Python names a file that is not UTF-8
        ("\U000e1234", r"\U000e1234"),  # which no font has
    ],
)
def test_names_are_drawn_as_they_are_written(name, drawn, recwarn):
    figure = pictures.samples(np.zeros((1, 3, 28, 28)), [0], (name,))
    titled = pictures.depth_maps(np.zeros((1, 3, 28, 28)), np.ones((1, 17)), 4, [name])
    for canvas in (figure, titled):
        FigureCanvasAgg(canvas).draw()
    words = figure.axes[0].yaxis.label, titled.axes[0].title
    assert [word.get_text() for word in words] == [drawn] * 2
    assert not any(word.get_parse_math() for word in words)
    assert not any("Glyph" in str(warning.message) for warning in recwarn)


def test_a_name_too_long_for_its_place_is_broken():
    figure = pictures.depth_maps(
        np.zeros((2, 3, 28, 28)), np.ones((2, 17)), 4, ["x" * 240, "stegosaurus"]
    )
    longest = max(figure.axes[0].get_title().split("\n"), key=len)
    assert len(longest) <= 50 and figure.axes[1].get_title() == "stegosaurus"


def test_more_images_go_on_in_further_rows_with_their_titles():
    titles = [f"folder/image_{number}\npredicted: cat" for number in range(5)]
    figure = pictures.depth_maps(
        np.zeros((5, 3, 28, 28)), np.full((5, 17), 3), 4, titles, columns=2
    )
    axes = np.array(figure.axes[:-1]).reshape(12, 2)  # the last is the key
    found = [axis.get_title() for row in axes[::4] for axis in row]
    assert found == [title.replace("_", " ") for title in titles] + [""]
    assert len(axes[0, 0].images) == 1 and not axes[8, 1].images


def test_depths_of_several_models_stand_below_each_image_with_their_words():
    depths = {
        name: np.arange(15).reshape(3, 5) % modulus for name, modulus in (("one", 4), ("other", 3))
    }
    maps = {
        "one": (depths["one"], ["AUC 0.1", "AUC 0.2", "AUC 0.3"]),
        "other": (depths["other"], []),
    }
    images = np.linspace(0, 1, 3)[:, None, None, None] * np.ones((3, 3, 28, 28))
    figure = pictures.depths_beside(images, ["an_ant", "bee", "cat"], maps, 4, columns=2)
    axes = np.array(figure.axes[:-1]).reshape(
        6, 2
    )  # the last is the key; two images, then the third
    assert [axis.get_ylabel() for axis in axes[:, 0]] == ["image", "one", "other"] * 2
    titles = [[axis.get_title() for axis in row] for row in axes]
    assert titles == [
        ["an ant", "bee"],
        ["AUC 0.1", "AUC 0.2"],
        ["", ""],
        ["cat", ""],
        ["AUC 0.3", ""],
        ["", ""],
    ]
    for number, value in enumerate((0, 0.5, 1)):
        row, column = 3 * (number // 2), number % 2
        assert (shown(axes[row, column]) == value).all()
        for below, depth in enumerate(depths.values(), start=1):
            expected = pictures.coloured(depth[number, 1:].reshape(2, 2), 4)
            np.testing.assert_array_equal(shown(axes[row + below, column]), expected)
    assert not any(axis.images for axis in axes[3:, 1])


def test_the_last_row_shows_what_the_last_layer_sees():
    images, depth = np.ones((1, 3, 28, 28)), np.array([[4, 1, 4, 3, 4]])
    (axis,) = rows(pictures.depth_maps(images, depth, layers=4))["in the\nlast layer"]
    corners = shown(axis)[[0, 0, -1, -1], [0, -1, 0, -1]]
    np.testing.assert_array_equal((corners == 1).all(axis=1), [False, True, False, True])
    np.testing.assert_allclose(corners[0], 0.12 + 0.88 * np.array(pictures.VEIL))


def test_the_veil_is_the_thicker_the_earlier_a_token_halted():
    images, depth = np.ones((1, 3, 28, 28)), np.array([[4, 1, 2, 3, 4]])
    (axis,) = rows(pictures.depth_maps(images, depth, layers=4))["veiled\nby depth"]
    red = shown(axis)[[0, 0, -1, -1], [0, -1, 0, -1], 0]
    assert (
        (np.diff(red) > 0).all()
        and red[-1] == 1
        and red[0] == pytest.approx(0.12 + 0.88 * pictures.VEIL[0])
    )


def test_a_veil_needs_no_spread_of_depth():
    figure = pictures.depth_maps(np.ones((1, 3, 28, 28)), np.full((1, 17), 3), layers=4)
    (veiled,), (left,) = rows(figure)["veiled\nby depth"], rows(figure)["in the\nlast layer"]
    assert (shown(veiled) == 1).all() and np.isfinite(shown(left)).all()
    FigureCanvasAgg(figure).draw()


def test_progress_veils_exactly_the_tokens_that_have_halted():
    images = np.ones((1, 3, 28, 28))
    depth = np.array([[4, 1, 2, 3, 4]])  # a class token and 2 x 2 patches
    found = rows(pictures.halting_progress(images, depth))
    assert list(found) == ["layer 1", "layer 2", "layer 3", "layer 4"]
    untouched = [shown(axis)[[0, 0, -1, -1], [0, -1, 0, -1], 0] == 1 for (axis,) in found.values()]
    np.testing.assert_array_equal(
        untouched,
        [
            [True] * 4,
            [False, True, True, True],
            [False, False, True, True],
            [False, False, False, True],
        ],
    )
    assert [axis.get_title() for (axis,) in found.values()] == ["100%", "75%", "50%", "25%"]


def test_progress_is_shown_in_at_most_seven_layers_that_differ():
    depth = np.concatenate(
        [np.full((2, 1), 12), np.random.default_rng(0).integers(3, 13, (2, 49))], axis=1
    )
    names = list(rows(pictures.halting_progress(np.ones((2, 3, 28, 28)), depth)))
    assert len(names) == 7 and names[0] == "layer 3" and names[-1] == "layer 12"


def test_samples_stand_in_the_row_of_their_class():
    images = np.linspace(0, 1, 4)[:, None, None, None] * np.ones((4, 3, 28, 28))
    found = rows(pictures.samples(images, [2, 0, 2, 0], ("an_ant", "bee", "cat")))
    assert list(found) == ["an ant", "cat"]  # a bee is not among them
    assert [[shown(axis).max() for axis in row] for row in found.values()] == [
        pytest.approx([1 / 3, 1]),
        pytest.approx([0, 2 / 3]),
    ]
