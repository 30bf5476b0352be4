"""Offloading of activations to host memory until the backward pass."""
