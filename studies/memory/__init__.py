"""How much memory a step needs: every tensor's birth and death counted, beside what is predicted."""
