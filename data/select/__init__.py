"""Selection of a store's documents by a score per document."""
