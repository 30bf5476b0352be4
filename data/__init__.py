"""Documents to token stores to mixtures to batches, as a pure function of seed and position."""
