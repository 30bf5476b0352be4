"""Hybrid data/context parallelism: documents on as many ranks as needed (arXiv 2502.21231)."""
