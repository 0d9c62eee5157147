"""Learning one shared mask on preference pairs."""
