"""What the notebooks and the command line see: one study, from its settings to its results.

``settings`` (profiles, one TOML file each in ``profiles/``) and ``study`` (its data, its models); ``tables``,
``figures`` and ``results``, which writes them down, with ``page`` for the README files; ``notebooks`` runs the
notebooks, ``fingerprint`` tells what is out of date; ``search``, ``sweep`` and ``benchmark`` are commands of their own.

May import every other room; nothing but the command line and the notebooks imports it.
"""

from avit_lib.study.settings import Profile, Run, get_profile
from avit_lib.study.study import Study

__all__ = ["Profile", "Run", "Study", "get_profile"]
