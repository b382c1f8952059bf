"""`python -m curriq`, the same program as `curriq`."""

import sys

from curriq.cli import main

if __name__ == "__main__":
    sys.exit(main())
