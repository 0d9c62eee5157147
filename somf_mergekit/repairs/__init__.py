"""Published repairs of a model's safety that need no training, as merge methods of mergekit."""
