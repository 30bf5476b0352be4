"""``allometry report``: one page with the figures of many runs; the same figures as PNG."""
