"""A training process among others: signals, exit statuses, the launcher, the lock of a run's folder, Ray."""
