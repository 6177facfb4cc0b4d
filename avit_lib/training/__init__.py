"""Training: one loop for every model, checkpoints, several processes.

May import the method and ``data``; neither ``evaluation`` nor ``study``: the loop is given what
validates a model.
"""

from avit_lib.training.checkpoints import (
    create_model,
    load_checkpoint,
    load_pretrained,
    load_weights,
    read_description,
    read_weights,
    save_checkpoint,
)
from avit_lib.training.files import only_one, read_json, write_atomically, write_json
from avit_lib.training.loop import (
    Training,
    count_updates,
    finished_history,
    fit,
    pick_device,
    seed_everything,
    uses_bfloat16,
)
