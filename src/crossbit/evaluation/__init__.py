"""Perplexity with its standard error, and paired comparison of two models."""
