"""Measurements on real models and data."""
