"""The parallel layout: process groups, this rank's coordinates, and the rules that sizes must fulfil.

Change here: how processes start and are grouped. Only layout.py reads Megatron's parallel_state.
"""
