"""What the notebooks and the command line see: one study, from its settings to its results.

``reading`` finds profiles, one TOML file each in ``profiles/``, ``settings`` checks them. ``study``
has the data and models of one, and trains what is missing or of other settings; ``results`` writes
what was found.

May import the method, data, training and evaluation; neither report nor the command line.
"""

from importlib import import_module

HOMES = {
    "Profile": "settings",
    "Run": "settings",
    "Sentence": "results",
    "Study": "study",
    "get_profile": "settings",
}
__all__ = ["Profile", "Run", "Sentence", "Study", "get_profile"]


def __getattr__(name: str):
    """Import a name when it is asked for: ``reading`` alone needs no torch."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
