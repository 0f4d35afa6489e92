"""The servers of a run: who serves, and how a failed one comes back."""
