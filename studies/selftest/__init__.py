"""Test of machines for a configuration, with their speed: ``allometry.launch.selftest``."""
