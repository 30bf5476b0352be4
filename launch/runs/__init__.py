"""Commands about runs and their inputs."""
