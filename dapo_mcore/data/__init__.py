"""From data files to tokens: rows, prompts, chat rendering, and the seeded order of training.

Change here: which files are read, what a row must have, how a prompt is rendered, and the order of prompts.
"""
