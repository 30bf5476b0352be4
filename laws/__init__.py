"""What runs say: reading run folders and, from them, the laws."""
