"""From a run's description to its predicted step and memory, and to the best layout for it."""
