"""``allometry memory --probe``: every tensor of a step counted, beside what is predicted."""
