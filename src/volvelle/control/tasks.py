"""Tasks of the control wing."""
