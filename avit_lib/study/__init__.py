"""What the notebooks and the command line see: one study, from its settings to its results.

``settings`` reads profiles, one TOML file each in ``profiles/``. ``study`` has the data and models
of one, and trains what is missing or of other settings; ``results`` writes what was found.

May import the method, data, training and evaluation; neither report nor the command line.
"""

from avit_lib.study.results import Sentence
from avit_lib.study.settings import Profile, Run, get_profile
from avit_lib.study.study import Study
