"""Tasks of the planning wing."""
