"""Checkpoints of a run: weights, optimizer and data position, saved and loaded under any parallel layout.

Change here: what a checkpoint holds, and when one counts as whole.
"""
