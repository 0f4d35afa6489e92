"""Predicts a run from its configuration: batch arithmetic, memory of each phase, FLOPs and times, and better layouts.

    config.json + YAML → job → batch, memory, times → what does not fit, suggestions → report

No GPU, no weights. Every figure that is not arithmetic is in hardware.py, with its source.
"""
