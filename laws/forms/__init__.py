"""Law forms, one file for each family; each file lists its forms in ``FORMS``."""
