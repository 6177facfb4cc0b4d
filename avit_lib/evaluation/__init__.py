"""What measures any classifier: accuracy with intervals (``metrics``), depth maps, time.

May import the method and ``data``; neither ``training`` nor ``study``.
"""

from avit_lib.evaluation.metrics import (
    Predictions,
    bootstrap_intervals,
    check_answers,
    divergence,
    draw_again,
    draw_over_seeds,
    find_interval,
    mean_ratio,
    metrics,
    paired_difference,
    predict,
    rate_draws,
)
