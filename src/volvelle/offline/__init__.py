"""Offline, goal-conditioned and imitation learning from recorded episodes."""
