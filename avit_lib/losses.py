"""The training objective L = L_task + alpha_p * L_ponder + alpha_d * L_distr (equations 8 to 11), term by term."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avit_lib import distributed
from avit_lib.config import Halting


@dataclass(frozen=True)
class Losses:
    """The loss to minimise and its unweighted parts, scalars each, by the name under which they are logged."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


def ponder_loss(ponder: Tensor) -> Tensor:
    """Mean of ponder rho [B, N] over images and tokens: layers executed + remainder (equation 9)."""
    return ponder.mean()


def halting_distribution(halting_scores: Tensor) -> Tensor:
    """Mean halting score H [L] of each layer, from scores [B, L, N], normalised to sum 1 (equation 10).

    The mean is over images, of all processes, and patch tokens; halted tokens count 0, the class token (token 0) is
    left out.
    """
    mean_score = distributed.mean(halting_scores[:, :, 1:].mean(dim=(0, 2)))
    return mean_score / mean_score.sum()


def target_distribution(mean: float, std: float, layers: int, device: torch.device | None = None) -> Tensor:
    """The Gaussian prior [L] over layers 1..L, its density at each layer normalised to sum 1 (section 3.3)."""
    layer = torch.arange(1, layers + 1, device=device, dtype=torch.float32)
    return torch.softmax(-0.5 * ((layer - mean) / std) ** 2, dim=0)


def distribution_loss(distribution: Tensor, target: Tensor, direction: str = "paper") -> Tensor:
    """KL divergence between the halting distribution H [L] and its target [L] (equation 11).

    ``direction`` "paper" is KL(H || target), as printed; "code" is KL(target || H), as in the published code.
    """
    if direction not in ("paper", "code"):
        raise ValueError(f"direction must be 'paper' or 'code', not {direction!r}")
    p, q = (distribution, target) if direction == "paper" else (target, distribution)
    tiny = torch.finfo(p.dtype).tiny  # a layer in which nothing halts has H = 0
    return (p * (p.clamp_min(tiny).log() - q.clamp_min(tiny).log())).sum()


@dataclass(frozen=True)
class TaskLoss:
    """Cross-entropy with label smoothing: all there is to train for a model that does not halt.

    Labels are classes [B] or, as Mixup makes them, probabilities [B, K].
    """

    label_smoothing: float = 0.0

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Losses:
        task = F.cross_entropy(model(images).float(), labels, label_smoothing=self.label_smoothing)
        return Losses(task, {"task": task})


@dataclass(frozen=True)
class AdaptiveLoss:
    """The A-ViT objective; the one place where its terms are weighted (equation 8)."""

    halting: Halting
    label_smoothing: float = 0.0

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Losses:
        logits, trace = model.forward_with_trace(images)
        layers = trace.halting_scores.shape[1]
        target = target_distribution(self.halting.target_depth, self.halting.target_std, layers, images.device)
        task = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        ponder = ponder_loss(trace.ponder)
        distr = distribution_loss(halting_distribution(trace.halting_scores), target, self.halting.kl_direction)
        total = task + self.halting.alpha_ponder * ponder + self.halting.alpha_distr * distr
        return Losses(total, {"task": task, "ponder": ponder, "distr": distr, "depth": trace.depth.float().mean()})
