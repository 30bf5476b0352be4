"""What a run is on disk: folder, checkpoints, resume, branches."""
