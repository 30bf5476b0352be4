"""``python -m allometry.launch.train CONFIG [section.key=value ...]``: one rank of a run."""

from __future__ import annotations

import sys

from allometry.launch.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
