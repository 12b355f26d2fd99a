"""Reinforcement learning for token policies: five wheels and one loop."""
