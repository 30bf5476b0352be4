"""Figures as plain data, and the matplotlib code that draws them."""
