"""Activation quantizers and the quantization kernel."""
