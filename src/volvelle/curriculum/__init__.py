"""Choosing what to train on: contexts, levels, tasks; and update rules learnt over many of them."""
