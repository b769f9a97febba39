"""Linear layers that run what was exported."""
