"""``python -m allometry.launch.memory CONFIG --probe`` under torchrun: memory on real ranks."""

from __future__ import annotations

import sys

from allometry.launch.cli import main

if __name__ == "__main__":
    main(["memory", *sys.argv[1:]])
