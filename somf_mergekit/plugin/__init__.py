"""The only folder that touches mergekit's registry and planner."""
