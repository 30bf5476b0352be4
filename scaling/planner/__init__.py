"""What a layout costs: step time from the model, the layout, the hardware and fitted constants."""
