"""Memory on real ranks: ``python -m allometry.launch.memory CONFIG --probe`` under torchrun."""

from __future__ import annotations

import sys

from allometry.launch.cli import main

if __name__ == "__main__":
    main(["memory", *sys.argv[1:]])
