"""``python -m avit_lib``."""

from avit_lib.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
