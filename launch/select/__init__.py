"""``allometry select``: scores of documents, and what a share by them keeps."""
