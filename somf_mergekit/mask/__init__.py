"""The mask: mathematics, noise, granularity and the artifact on disk."""
