"""The objective: advantages, which groups teach, token weights, mismatch correction, KL. Pure functions on arrays."""
