"""``python -m avit_lib``."""

import sys

from avit_lib.cli import main

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
