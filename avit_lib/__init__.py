"""A-ViT: adaptive tokens for efficient vision transformers, whose halted tokens are really gone.

What a reader of the paper looks for stands here, beside this file, in the order of the imports:
Algorithm 1 (``halting``), the objective (``losses``), how halted tokens leave the computation
(``packed``), the model (``model``), where halting starts (``starts``), and tokens that merge
without any training (``merging``, ``adaptive``). They import torch and timm alone, and none of the
rooms below: ``peers``, other methods on the same backbone; ``data``, ``training`` and
``evaluation``, for any classifier; ``study`` and ``report``, what the notebooks and the command
line (``cli``, ``commands``) need besides.

Importing it registers the ``avit_*`` models with timm.
"""

import sys

# `python -m avit_lib` says at once what is wrong with its arguments, before torch is imported.
# While Python locates a module to run, the name of the program is "-m".
if sys.argv[:1] != ["-m"] or "avit_lib" not in sys.orig_argv:
    from avit_lib.adaptive import Adaptive, adapt
    from avit_lib.errors import UserError
    from avit_lib.halting import HaltingRule, HaltingTrace
    from avit_lib.losses import AdaptiveLoss, TaskLoss
    from avit_lib.model import AViT
    from avit_lib.starts import calibrate_beta, fit_start, scale_channel_rate


def load(path, device="cpu"):
    """The model that ``fit``, ``adapt`` or a release wrote to ``path``, and its description.

    The model (nn.Module) is in evaluation mode on ``device``; the description (dict) is the JSON
    beside the .safetensors. Raises UserError when one of both is missing, damaged, or of another
    model.
    """
    from avit_lib.training import load_checkpoint  # only now: it needs more than torch and timm

    return load_checkpoint(path, device)


__version__ = "0.1.0"
