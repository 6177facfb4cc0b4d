"""Do depth maps show the object? Measured where the background has one colour."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from avit_lib.data import Images, loader, to_pixels

TOLERANCE = 0.1  # of a colour, in any channel of 0..1, within which it counts as that of the border
BORDER = 0.9  # share of its pixels that have the border colour, where the background has one
OBJECT = 0.5  # share of differing pixels above which a patch is one of the object
BACKGROUND = 0.02  # and below which it is one of the background


def differing(images: Tensor, grid: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of images [B, C, H, W] (0..1): whether the border has one colour, and what else has not.

    The colour is the border's median; whether it has one is [B] bool. The share of pixels of
    another colour is [B, P], of the patches of a ``grid`` (rows, columns), a number being both.
    """
    outside = torch.ones(images.shape[2:], dtype=torch.bool)
    outside[1:-1, 1:-1] = False
    border = images[..., outside]  # [B, C, pixels]
    colour = border.median(dim=-1, keepdim=True).values
    alike = (border - colour).abs().amax(dim=1) <= TOLERANCE
    other = (images - colour[..., None]).abs().amax(dim=1) > TOLERANCE
    share = F.adaptive_avg_pool2d(other.float(), grid).flatten(1)
    return alike.float().mean(dim=-1) >= BORDER, share


def plain_backgrounds(data: Images, grid: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The images of ``data`` whose border has one colour: numbers [k], ``differing`` [k, P]."""
    found = [differing(to_pixels(images), grid) for images, _ in loader(data, 250)]
    plain, share = (torch.cat(part) for part in zip(*found, strict=True))
    return plain.nonzero()[:, 0], share[plain]


def object_auc(depth: Tensor, share: Tensor) -> Tensor:
    """How surely patches of the object are deeper than of the background: an AUC [B] an image.

    1 is always, 0.5 by chance. ``depth`` [B, P] of the patches, ``share`` as ``differing`` has it;
    NaN for an image without patches of either kind.
    """
    found = torch.full((len(depth),), torch.nan)
    for number, (one, differs) in enumerate(zip(depth.float(), share, strict=True)):
        known = (differs > OBJECT) | (differs < BACKGROUND)
        truth = (differs > OBJECT)[known]
        if truth.any() and not truth.all():
            # Ranks in 0..1, or torchmetrics would take them for logits.
            found[number] = binary_auroc(one[known] / one.max(), truth.long())
    return found
