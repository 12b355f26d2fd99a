"""Exact mathematics: tabular MDPs, return distributions, bandits, matrix and Markov games."""
