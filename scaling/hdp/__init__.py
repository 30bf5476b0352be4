"""Hybrid data/context parallelism: assignment of documents to ranks, and its cost."""
