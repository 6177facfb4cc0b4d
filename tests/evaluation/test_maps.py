"""Whether depth maps show the object, on images of which it is known."""

import pytest
import torch

from avit_lib.data import STATISTICS
from avit_lib.data.images import Images
from avit_lib.evaluation.maps import object_auc, plain_backgrounds


def test_images_with_a_border_of_one_colour_are_found_and_the_object_is_what_differs():
    images = torch.ones(3, 3, 8, 16)
    images[:, :, 4:7, 8:12] = 0  # three quarters of one patch
    images[[0, 2], :, 0, :8] = 0.5  # a grey part of the border
    mean, std = (torch.tensor(part)[:, None, None] for part in STATISTICS)
    data = Images(images, torch.zeros(3).long(), ("one",), lambda pixels: (pixels - mean) / std)
    chosen, share = plain_backgrounds(data, (2, 4))
    assert chosen.tolist() == [1]
    assert share.tolist() == [[0, 0, 0, 0, 0, 0, 0.75, 0]]


def test_the_auc_is_the_share_of_pairs_in_which_the_object_is_deeper():
    share = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.3]] * 3 + [[0.0] * 5])
    depth = torch.tensor([[9, 8, 3, 2, 1], [2, 3, 8, 9, 1], [9, 2, 5, 5, 1], [1, 2, 3, 4, 5]])
    found = object_auc(depth, share)
    assert found[:3].tolist() == pytest.approx([1.0, 0.0, 0.5])
    assert found[3].isnan()
