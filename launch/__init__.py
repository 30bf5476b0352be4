"""Command-line interface of Allometry."""
