"""Memory of every tensor of a step, measured and predicted: ``allometry memory --probe``."""
