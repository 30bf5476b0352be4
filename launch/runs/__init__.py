"""Commands about runs and what they need."""
