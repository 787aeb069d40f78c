"""`python -m baton`."""

import sys

from baton.cli import main

if __name__ == "__main__":
    sys.exit(main())
