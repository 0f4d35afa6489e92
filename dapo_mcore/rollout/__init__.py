"""Rollouts: engines that generate, and the sampler that turns prompts into the groups a step trains on."""
