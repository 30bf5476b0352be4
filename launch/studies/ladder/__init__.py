"""Commands for ladders of runs."""
