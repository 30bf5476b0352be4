"""Scaling laws: reading run folders and tables, and fitting laws to them."""
