"""Runs ``python -m kernels.tune``."""

import sys

from kernels.tune.run_tune import main

if __name__ == "__main__":
    sys.exit(main())
