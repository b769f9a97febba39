"""Rewrites of a model that leave its function unchanged."""
