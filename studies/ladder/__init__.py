"""``allometry ladder``: planning, training and following the rungs of a ladder."""
