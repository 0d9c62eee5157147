"""What a recipe may say, and what is wrong with it."""
