"""What measures any classifier: accuracy with intervals (``metrics``), FLOPs (``flops``), time
(``speed``), memory.

May import the method and ``data``; neither ``training`` nor ``study``.
"""

from avit_lib.evaluation.flops import counted_flops, flops_per_image
from avit_lib.evaluation.metrics import (
    Predictions,
    bootstrap_intervals,
    metrics,
    paired_difference,
    predict,
    standard_error,
)

__all__ = [
    "Predictions",
    "bootstrap_intervals",
    "counted_flops",
    "flops_per_image",
    "metrics",
    "paired_difference",
    "predict",
    "standard_error",
]
