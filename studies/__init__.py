"""Studies of models and layouts, by many runs or by single steps."""
