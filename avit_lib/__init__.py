"""A-ViT: adaptive tokens for efficient vision transformers. Importing it registers the avit_* models with timm."""

from avit_lib import models
from avit_lib.config import StudyError, get_profile
from avit_lib.halting import HaltingTrace
from avit_lib.models import AViT

__all__ = ["AViT", "HaltingTrace", "StudyError", "get_profile", "models"]
__version__ = "0.1.0"
