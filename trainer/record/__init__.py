"""What a run says while it trains: rows, events, monitors, callbacks."""
