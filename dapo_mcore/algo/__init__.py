"""The objective: advantages, dynamic sampling's test, token weights, mismatch correction, KL in the reward.

Change here: the mathematics, as pure functions on arrays. The loss of a single token is in kernels/policy_loss.
"""
