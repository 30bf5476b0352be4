"""Hybrid data/context parallelism: each document gets the ranks it needs (arXiv 2502.21231)."""
