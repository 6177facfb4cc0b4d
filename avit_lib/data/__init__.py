"""Images: their files (``files``), where they come from (``datasets``), who sees them (``splits``),
and how they become batches (``images``).

May import the method's errors; no other room. The others import what is named here, not the
modules.
"""

from avit_lib.data.datasets import IMAGENET_CLASSES, Data, are_imagenets
from avit_lib.data.files import find_images, read_all, tell
from avit_lib.data.images import STATISTICS, Images, loader, read_image, to_pixels
from avit_lib.data.splits import (
    TrainingData,
    folder_test_data,
    folder_training_data,
    pick_per_class,
    test_data,
    training_data,
)
from avit_lib.places import check_embedded, data_dir
