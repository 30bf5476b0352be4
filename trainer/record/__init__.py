"""Records of a run during training: rows, events, monitors, callbacks."""
