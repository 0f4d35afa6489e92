"""Weights to servers: from disk, by broadcast, or by shared memory, in one transaction."""
