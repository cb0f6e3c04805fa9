"""Runs ``python -m kernels.bench``."""

import sys

from kernels.bench.run_bench import main

if __name__ == "__main__":
    sys.exit(main())
