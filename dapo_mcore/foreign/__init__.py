"""Runs of verl, slime and NeMo-RL in our words: their scripts and configurations are read, never run."""
