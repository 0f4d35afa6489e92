"""Which groups a rollout step trains on: dynamic sampling, refill, what is carried over. Knows no engine."""
