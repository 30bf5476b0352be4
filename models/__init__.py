"""Model modules in plain torch, without knowledge of ranks or process groups."""
