"""Conversion of Hugging Face folders: tensor names, configurations, weights, comparison."""
