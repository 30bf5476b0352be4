"""``allometry.launch.selftest``: whether these machines can run a configuration, and how fast."""
