"""Commands that fit, compare and use laws."""
