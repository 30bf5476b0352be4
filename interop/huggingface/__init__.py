"""Hugging Face folders: names, configurations, weights, comparison."""
