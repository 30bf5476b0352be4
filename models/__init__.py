"""Plain torch modules that know no ranks."""
