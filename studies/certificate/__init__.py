"""``allometry verify``: the same step and run on several layouts, compared."""
