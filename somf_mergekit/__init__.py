"""Safety realignment of merged models for mergekit: the merge method `somf`."""
