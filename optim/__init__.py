"""Parameter groups, update rules, clipping and schedules."""
