"""Rollouts: the engines that generate responses, and the sampler that chooses the groups a step trains on.

Change here: a new engine (build.py, types.RolloutEngine). sampling/ is the same for every engine.
"""
