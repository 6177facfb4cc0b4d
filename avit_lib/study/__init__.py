"""What the notebooks and the command line see: one study, from its settings to its results.

``settings`` reads profiles, one TOML file each in ``profiles/``. ``study`` has the data and models
of one, and trains what is missing or out of date; ``fingerprint`` is the code that a result was
computed from. ``tables`` and ``figures`` compare models, ``pictures`` show tokens, where several
places need them; what one notebook alone shows is made in it. ``results`` writes them and pages of
them, ``notebooks`` runs notebooks; ``sweep`` and ``benchmark`` are commands.

May import every other room; nothing but the command line and the notebooks imports it.
"""

from avit_lib.study.settings import Profile, Run, get_profile
from avit_lib.study.study import Study

__all__ = ["Profile", "Run", "Study", "get_profile"]
