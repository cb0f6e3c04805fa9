"""Starts a run: ``torchrun --nproc-per-node=N train.py +recipe=NAME [OPTION=VALUE ...]``.

``train.py --cfg +recipe=NAME`` prints the resolved config and ends; ``train.py --help`` says more.
Installed, the same is ``graft train [--nproc N] +recipe=NAME``, or ``torchrun -m recipes.launch``.
"""

# hydra's shell completion serves files that contain: @hydra.main

from __future__ import annotations

import sys

from recipes.launch import end_process, main

if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
