"""Pictures in, the same kind of pictures out: reading, writing, tiling, restoring."""
