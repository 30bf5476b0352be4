"""Which documents of a store are read: a score for each of them, and what is kept by it."""
