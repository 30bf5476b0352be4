"""One-line faults, planted one at a time, and which of them the tests see: see run.py."""
