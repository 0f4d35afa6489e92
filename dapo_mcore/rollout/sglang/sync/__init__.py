"""How new weights reach the servers: from disk, by a broadcast, or by shared memory, and in which form."""
