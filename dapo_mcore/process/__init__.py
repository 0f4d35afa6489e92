"""A run's processes and their surroundings: signals, exit status, launcher, lock of the run's folder, Ray cluster.

Change here: how a run starts, ends and shares a machine. What is trained, saved or logged does not belong here.
"""
