"""Recorded episodes: in memory, on disk in four layouts, checked, measured, collected and mixed."""
