"""Hybrid data/context parallelism: each document is sharded over the ranks that it needs (arXiv
2502.21231).
"""
