"""Predicted step time and memory of a run, and search for its best layout."""
