"""A planned merge in, a mask artifact out."""
