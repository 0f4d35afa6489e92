"""The servers of a run: which of them serve, how they move to new weights together, and how a failed one comes back."""
