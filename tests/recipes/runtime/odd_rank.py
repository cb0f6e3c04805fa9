"""``train.py`` where the second rank is told more than the rest: ``odd_rank.py MORE -- OPTION=VALUE ...``."""

from __future__ import annotations

import os
import sys

from recipes.launch import end_process, main

if __name__ == "__main__":
    place = sys.argv.index("--")
    odd, common = sys.argv[1:place], sys.argv[place + 1 :]
    end_process(main([*common, *(odd if os.environ["RANK"] == "1" else ())]))
