"""One rank of a run: ``python -m allometry.launch.train CONFIG [section.key=value ...]``."""

from __future__ import annotations

import sys

from allometry.launch.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
