"""Test the machines: ``python -m allometry.launch.selftest CONFIG`` under torchrun."""

from __future__ import annotations

import sys

from allometry.launch.cli import main

if __name__ == "__main__":
    main(["selftest", *sys.argv[1:]])
