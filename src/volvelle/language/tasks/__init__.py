"""Tasks of the language wing."""
