"""Scores of documents, and selection of documents by score: ``allometry select``."""
