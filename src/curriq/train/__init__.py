"""The one loop, and what surrounds it: building a run, logging, checkpoints, resuming."""
