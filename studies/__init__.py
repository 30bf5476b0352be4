"""Studies: many runs, or one step many times, to learn something of a model or a layout."""
