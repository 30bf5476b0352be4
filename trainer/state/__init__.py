"""State of a run on disk: run folder, checkpoints, resume, branches."""
