"""Commands about a ladder of runs."""
