"""The loop over blocks: load, observe, transform, solve, write, advance, free."""
