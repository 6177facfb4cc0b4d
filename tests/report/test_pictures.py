"""Pictures of tokens: each shows every patch in its place, veiled as deep as it went."""

import numpy as np
import pytest
from conftest import assert_on_the_page
from matplotlib.backends.backend_agg import FigureCanvasAgg

from avit_lib.report import pictures

BLACK, WHITE = np.zeros((1, 3, 28, 28)), np.ones((1, 3, 28, 28))
CORNERS = [0, 0, -1, -1], [0, -1, 0, -1]  # of four patches in reading order


def show_rows(figure):
    """What each row of a figure shows, in order: its name, and the arrays and titles in it."""
    found = []
    for axis in figure.axes:
        if axis.get_subplotspec() and axis.get_subplotspec().colspan.start == 0:
            found.append((axis.get_ylabel(), [], []))
        if axis.images:
            found[-1][1].append(axis.images[0].get_array())
            found[-1][2].append(axis.get_title())
    return found


def show(figure, name):
    """What the one picture in the row of this name shows."""
    (picture,) = next(arrays for row, arrays, _ in show_rows(figure) if row == name)
    return picture


def test_depth_maps_draw_with_their_labels_on_the_page():
    images, depth = np.ones((5, 1, 32, 64)), np.arange(5)[:, None] + np.arange(129) % 8 + 1
    names = [f"some_class_{number} 7.5" for number in range(5)]
    assert_on_the_page(pictures.depth_maps(images, depth, 12, names))


def test_maps_show_patches_in_reading_order_without_the_class_token_also_if_not_square():
    depth, images = np.concatenate([[99], np.arange(1, 129)])[None], np.ones((1, 3, 32, 64))
    figure = pictures.depth_maps(images, depth, 128)
    expected = pictures.coloured(np.arange(1, 129).reshape(8, 16), 128)
    np.testing.assert_array_equal(show(figure, "depth"), expected)
    by_depth = show(figure, "veiled\nby depth")[2::4, 2::4, 0].ravel()
    assert (np.diff(by_depth) > 0).all() and by_depth[-1] == 1  # by layers, whatever is shown
    unveiled = (show(figure, "in the\nlast layer") == 1).all(axis=-1)
    assert unveiled[28:, 60:].all()  # the last patch, of 4 x 4 pixels
    assert unveiled.sum() == 16


def test_a_grid_is_given_or_follows_from_the_images_or_is_square():
    depth = np.arange(145)[None]
    assert pictures.grids(depth).shape == (1, 12, 12)
    assert pictures.grids(depth, (48, 192)).shape == (1, 6, 24)
    with pytest.raises(ValueError, match="reshape"):
        pictures.grids(depth[:, :129])  # 128 patches are no square


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        (r"bad$\foo$.jpg", r"bad$\foo$.jpg"),
        ("caf\udce9 \U000e1234", r"caf\udce9 \U000e1234"),  # not UTF-8, and in no font
    ],
)
def test_names_are_drawn_as_they_are_written(name, drawn, recwarn):
    figure = pictures.mosaic([(name, pictures.rgb(BLACK), [name])])
    FigureCanvasAgg(figure).draw()
    for words in (figure.axes[0].yaxis.label, figure.axes[0].title):
        assert words.get_text() == drawn
        assert not words.get_parse_math()
    assert not any("Glyph" in str(warning.message) for warning in recwarn)


def test_more_images_go_on_in_further_rows_with_their_titles():
    grey = pictures.rgb(np.linspace(0, 1, 3)[:, None, None, None] * WHITE)
    rows = [("image", grey, ["an_ant\n1.0", "bee", "cat"]), ("depth", grey, [])]
    found = show_rows(pictures.mosaic(rows, columns=2))
    assert [row for row, *_ in found] == ["image", "depth"] * 2
    assert [words for *_, words in found[::2]] == [["an_ant\n1.0", "bee"], ["cat"]]
    assert found[2][1][0].max() == 1  # the third image


def test_veils_are_the_thicker_the_earlier_a_token_halted():
    figure = pictures.depth_maps(WHITE, np.array([[4, 1, 2, 3, 4]]), layers=4)
    by_depth = show(figure, "veiled\nby depth")[CORNERS]
    thickest = 0.12 + 0.88 * np.array(pictures.VEIL)
    np.testing.assert_allclose(by_depth[[0, 3]], [thickest, [1, 1, 1]])
    assert (np.diff(by_depth[:, 0]) > 0).all()
    last = show(figure, "in the\nlast layer")[CORNERS]
    np.testing.assert_allclose(last, [thickest] * 3 + [[1, 1, 1]])
    alike = pictures.depth_maps(WHITE, np.full((1, 5), 1), layers=4)
    np.testing.assert_allclose(show(alike, "veiled\nby depth")[CORNERS], [thickest] * 4)
