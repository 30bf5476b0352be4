"""Activations that wait for the backward in the host's memory."""
