"""Preparation in many tasks, on the executors of datatrove (docs/preparation.md)."""
