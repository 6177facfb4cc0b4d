"""Do depth maps show the object? Measured where the image says what the object is: on a background
of one colour.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from avit_lib.data import Images, loader, to_pixels

TOLERANCE = 0.1  # of a colour, in any channel of 0..1, within which it counts as that of the border
BORDER = 0.9  # share of its pixels that have the border colour, where the background has one
OBJECT, BACKGROUND = (
    0.5,
    0.02,
)  # share of differing pixels: patches of the object have more, of the background less


def differing(images: Tensor, grid: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of images [B, C, H, W] (0..1): whether the border has one colour, [B], and how much of each
    patch is another.

    The colour is the border's median; the share of differing pixels is [B, P], of the patches of a
    ``grid`` (rows, columns), a number being both.
    """
    edges = (images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1])
    border = torch.cat(edges, dim=-1)  # [B, C, pixels]
    colour = border.median(dim=-1).values
    plain = ((border - colour[..., None]).abs().amax(dim=1) <= TOLERANCE).float().mean(
        dim=-1
    ) >= BORDER
    other = ((images - colour[..., None, None]).abs().amax(dim=1) > TOLERANCE).float()
    return plain, F.adaptive_avg_pool2d(other, grid).flatten(1)


def plain_backgrounds(data: Images, grid: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The numbers [k] of the images of ``data`` whose border has one colour, with ``differing`` [k,
    P].
    """
    plain, share = zip(
        *(differing(to_pixels(images), grid) for images, _ in loader(data, 250)), strict=True
    )
    chosen = torch.cat(plain).nonzero()[:, 0]
    return chosen, torch.cat(share)[chosen]


def object_auc(depth: Tensor, share: Tensor) -> Tensor:
    """How surely patches of the object are deeper than of the background: an AUC [B] an image, 1
    always, 0.5 by chance.

    ``depth`` [B, P] of the patches, ``share`` as ``differing`` has it; NaN for an image without
    patches of either kind.
    """
    found = []
    for one, differs in zip(depth.float(), share, strict=True):
        truth, known = differs > OBJECT, (differs > OBJECT) | (differs < BACKGROUND)
        both = truth[known].any() and not truth[known].all()
        # Ranks in 0..1, or torchmetrics would take them for logits.
        score = one[known] / one.max()
        found.append(binary_auroc(score, truth[known].long()) if both else torch.tensor(torch.nan))
    return torch.stack(found) if found else torch.zeros(0)


def chessboard(depth: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """How far depth [B, P] is a chessboard, [B]: |correlation| with the parity of row + column.

    ``grid`` is (rows, columns), by default as many; RuntimeError when P is not their product.
    """
    rows, columns = grid or [round(depth.shape[1] ** 0.5)] * 2
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    parity = ((row + column) % 2).flatten().float()
    parity, depth = parity - parity.mean(), depth.float() - depth.float().mean(dim=1, keepdim=True)
    return (depth @ parity).abs() / (depth.norm(dim=1) * parity.norm()).clamp(min=1e-12)
