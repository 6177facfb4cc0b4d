"""The training objective L = L_task + alpha_p * L_ponder + alpha_d * L_distr, term by term.

Equations 8 to 11 of the paper.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avit_lib.errors import UserError
from avit_lib.halting import HaltingTrace


@dataclass(frozen=True)
class Losses:
    """The loss to minimise, and its unweighted parts by the name under which they are logged."""

    total: Tensor
    parts: dict[str, Tensor]


def ponder_loss(ponder: Tensor) -> Tensor:
    """Mean of ponder rho [B, N], layers executed + remainder, over all tokens (equation 9)."""
    return ponder.mean()


def same(value: Tensor) -> Tensor:
    """The mean of ``value`` over the processes of a training, when there is one process."""
    return value


def halting_distribution(
    halting_scores: Tensor, average: Callable[[Tensor], Tensor] = same
) -> Tensor:
    """Mean halting score H [L] of each layer, from scores [B, L, N], with sum 1 (equation 10)."""
    # Without the class token; halted patches count 0.
    mean_score = average(halting_scores[:, :, 1:].mean(dim=(0, 2)))
    return mean_score / mean_score.sum()


def target_distribution(
    mean: float, std: float, layers: int, device: torch.device | None = None
) -> Tensor:
    """The Gaussian prior [L]: its density at each of the layers 1..L, with sum 1 (section 3.3)."""
    layer = torch.arange(1, layers + 1, device=device, dtype=torch.float32)
    return torch.softmax(-0.5 * ((layer - mean) / std) ** 2, dim=0)


def distribution_loss(distribution: Tensor, target: Tensor, direction: str = "paper") -> Tensor:
    """KL(H || target), [L] both (equation 11); ``direction`` "code": KL(target || H).

    The published code computes the second, but not this number: its ``KLDivLoss("batchmean")``
    takes [L] for a batch and divides by L (12 layers: 12 times smaller); its H is clamped to
    0.01..0.99 after it was normalised, counts the scores of tokens that have halted, has in the
    last layer their sigmoid in place of the 1 of Algorithm 1, and by a slip in an index (``h[1:]``,
    of [B, N]) leaves out the first image in place of the class token. Its target is centred on the
    ninth layer (mu = 8 counts from 0), with a sum of more than 3. Raises KeyError for another
    direction.
    """
    p, q = {"paper": (distribution, target), "code": (target, distribution)}[direction]
    tiny = torch.finfo(p.dtype).tiny  # a layer that no patch reaches has H = 0
    return (p * (p.clamp_min(tiny).log() - q.clamp_min(tiny).log())).sum()


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student), mean over images, of logits [B, K].

    From section 2 of arXiv 1503.02531, at temperature 1.
    """
    student = F.log_softmax(logits.float(), dim=1)
    teacher = F.log_softmax(teacher_logits.float(), dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class TaskLoss:
    """Cross-entropy of classes [B] or, as Mixup makes them, probabilities [B, K].

    A teacher, which is not in the paper, adds its distillation.
    """

    label_smoothing: float = 0.0
    teacher: nn.Module | None = None  # a trained model in evaluation mode
    distillation: float = 1.0  # its weight, beside the cross-entropy's 1

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, progress: float = 1.0
    ) -> Losses:
        return self.of_logits(model(images), images, labels)

    def of_logits(self, logits: Tensor, images: Tensor, labels: Tensor) -> Losses:
        """The loss of ``logits`` [B, K] that a model gave for ``images``."""
        task = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        if self.teacher is None:
            return Losses(task, {"task": task})
        with torch.no_grad():
            taught = self.teacher(images)
        distillation = distillation_loss(logits, taught)
        total = task + self.distillation * distillation
        return Losses(total, {"task": task, "distillation": distillation})


@dataclass(frozen=True)
class AdaptiveLoss:
    """The A-ViT objective: the weighted sum of its terms (equation 8; defaults: the paper's).

    Of a model as it is called, wrapped or not; raises UserError when that gives no halting scores.
    """

    alpha_ponder: float = 5e-4  # alpha_p
    # Fraction of training over which alpha_p grows linearly from 0; 0: full from the start
    ponder_ramp: float = 0.0
    alpha_distr: float = 0.1  # alpha_d
    target_depth: float = 8.0  # mu, in layers from 1; the published code counts from 0
    target_std: float = 1.0
    kl_direction: str = "paper"  # KL(H || target); "code": KL(target || H); see distribution_loss
    task: TaskLoss = TaskLoss()  # L_task
    average: Callable[[Tensor], Tensor] = same  # over the processes of a training, with a gradient

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, progress: float = 1.0
    ) -> Losses:
        """``progress`` is the fraction of training done, 0..1."""
        # By a call of the model itself: that is what wrappers see (DDP, autocast, compile).
        try:
            logits, trace = model(images, with_trace=True)
        except TypeError as error:  # a plain model knows no such argument
            if "with_trace" not in str(error):
                raise
            trace = None
        if not isinstance(trace, HaltingTrace):
            raise UserError("AdaptiveLoss needs the halting scores of an A-ViT; use TaskLoss")
        layers = trace.halting_scores.shape[1]
        target = target_distribution(self.target_depth, self.target_std, layers, images.device)
        found = halting_distribution(trace.halting_scores, self.average)
        task = self.task.of_logits(logits, images, labels)
        ponder = ponder_loss(trace.ponder)
        distr = distribution_loss(found, target, self.kl_direction)
        alpha_ponder = self.alpha_ponder
        if progress < self.ponder_ramp:
            alpha_ponder *= progress / self.ponder_ramp
        total = task.total + alpha_ponder * ponder + self.alpha_distr * distr
        depth = trace.depth.float().mean()
        return Losses(total, task.parts | {"ponder": ponder, "distr": distr, "depth": depth})
