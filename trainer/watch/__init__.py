"""Watch the ranks: their current work, late ranks, and the report before a hung run ends."""
