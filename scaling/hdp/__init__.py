"""Hybrid data/context parallelism: which ranks run which documents, and what that takes."""
