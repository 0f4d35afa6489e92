"""Choice of the groups that a rollout step trains on: dynamic sampling, refill, groups carried to the next step.

Change here: how groups are generated and chosen. No module here depends on a particular engine.
"""
