"""Checkpoints of a run: weights, optimizer and data position, saved and loaded under any parallel layout."""
