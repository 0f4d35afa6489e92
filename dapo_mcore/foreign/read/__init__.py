"""Readers of foreign runs, one per dialect. Each returns a ForeignRun: the settings as that framework would parse them."""
