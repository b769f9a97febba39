"""Weight solvers: how a weight becomes integers. Pure functions on tensors."""
