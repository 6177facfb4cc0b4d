"""Whether depth maps show the object, on images of which it is known."""

import pytest
import torch

from avit_lib.data.images import Images
from avit_lib.evaluation.maps import chessboard, differing, object_auc, plain_backgrounds


def square_on_white(size=8):
    """A black square of a quarter of the area, in the middle of white."""
    image = torch.ones(3, size, size)
    image[:, size // 4 : -size // 4, size // 4 : -size // 4] = 0
    return image


def test_a_border_of_one_colour_is_told_from_others_and_the_object_is_what_differs():
    framed = square_on_white()
    framed[:, 0, :4] = 0.5
    plain, share = differing(torch.stack([square_on_white(), framed]), 4)
    assert plain.tolist() == [True, False]
    assert share[0].view(4, 4).tolist() == [[0] * 4, [0, 1, 1, 0], [0, 1, 1, 0], [0] * 4]


def test_of_a_data_set_those_with_a_border_of_one_colour_are_found():
    framed = square_on_white()
    framed[:, 0, :4] = 0.5
    mean, std = (
        torch.tensor([0.485, 0.456, 0.406])[:, None, None],
        torch.tensor([0.229, 0.224, 0.225])[:, None, None],
    )
    images = torch.stack([framed, square_on_white(), framed, square_on_white()])
    data = Images(images, torch.zeros(4).long(), ("square",), lambda pixels: (pixels - mean) / std)
    chosen, share = plain_backgrounds(data, 4)
    assert chosen.tolist() == [1, 3] and share.shape == (2, 16) and share.sum() == 8


def test_the_auc_is_the_share_of_pairs_in_which_the_object_is_deeper():
    share = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.3]] * 3 + [[0.0] * 5])
    depth = torch.tensor([[9, 8, 3, 2, 1], [2, 3, 8, 9, 1], [9, 2, 5, 5, 1], [1, 2, 3, 4, 5]])
    found = object_auc(depth, share)
    assert found[:3].tolist() == pytest.approx([1.0, 0.0, 0.5]) and found[3].isnan()


def test_a_chessboard_is_one_and_smooth_maps_are_not():
    row, column = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    board = (3 + 4 * ((row + column) % 2)).flatten()
    depth = torch.stack([board, 10 - board, row.flatten(), torch.full((16,), 5)])
    assert chessboard(depth).tolist() == pytest.approx([1, 1, 0, 0], abs=1e-6)


def test_maps_that_are_not_square_have_a_grid():
    row, column = torch.meshgrid(torch.arange(2), torch.arange(8), indexing="ij")
    board = ((row + column) % 2).flatten()[None]
    assert chessboard(board, (2, 8)).item() == pytest.approx(1, abs=1e-6)
    with pytest.raises(RuntimeError, match="size"):
        chessboard(board[:, :15])
    image = torch.ones(1, 3, 8, 16)
    image[..., 4:, 8:12] = 0
    assert differing(image, (2, 4))[1].tolist() == [[0, 0, 0, 0, 0, 0, 1, 0]]
