"""``allometry prepare``: from text to token files."""
