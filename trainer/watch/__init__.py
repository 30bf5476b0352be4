"""Watching ranks: what each is doing, who is late, what is said before a hung run ends."""
