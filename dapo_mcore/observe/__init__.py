"""What a run shows and records: phase times, metrics, sample completions, the live view and the plots (see README.md).

Change here: names and meanings of metrics, where they are written, and how they look.
"""
