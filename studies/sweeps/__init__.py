"""Small models trained over sizes and learning rates: coordinate checks and transfer."""
