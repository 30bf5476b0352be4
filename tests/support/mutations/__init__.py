"""Plant one-line faults one at a time and count the faults that tests detect; see run.py."""
