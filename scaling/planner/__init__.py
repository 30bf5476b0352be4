"""Cost model: step time from the model, the layout, the hardware and fitted constants."""
