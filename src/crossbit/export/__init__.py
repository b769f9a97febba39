"""Writing and reading back the quantized checkpoint (compressed-tensors)."""
