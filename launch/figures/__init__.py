"""Figures as plain data, and the one place that draws them with matplotlib."""
