"""Weights on the move: names and shapes (mapping), files (hf_io), checkpoints, and sync to rollout engines."""
