"""One table of rules per dialect."""
