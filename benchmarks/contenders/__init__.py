"""Programs that train the same model, each as its users would run it."""
