"""Records of what each rollout step trained on and what came out, and runs that repeat recorded steps to compare."""
