"""Measure preparation in tasks: peak memory and tokens/s, against the size of corpus and shards.

    python benchmarks/preparation.py [--out FILE] [--scale 1.0]

The corpus is the built-in one, repeated with a number in front of each document, as JSON Lines. Each row is
one command ``allometry prepare --engine datatrove:local`` with one worker, in a process of its own
whose peak memory (VmHWM) the kernel reports for it and, for the largest, its children. Rows: corpora of 1, 2 and 4
units in shards of one unit, and of 4 units in one shard. Rate: tokens over the processor seconds of
the tasks, which other processes do not change much. The last part is arithmetic for ``--terabytes``
on ``--nodes`` nodes.
"""
