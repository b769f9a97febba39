"""Orthogonal changes of channels: pure functions on tensors."""
