"""What several notebooks and commands draw and tabulate of a study.

``tables`` compare models, ``figures`` are charts, ``pictures`` show images and their tokens. What
one notebook alone shows is made in it. May import ``study``; nothing but commands, scripts and
notebooks imports it.
"""
