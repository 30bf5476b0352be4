"""Report of many runs as one page, and its figures as PNG: ``allometry report``."""
