"""Masked models to one tensor, by mergekit's methods."""
