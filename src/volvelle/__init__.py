"""volvelle: reinforcement-learning methods as recipes of interchangeable parts."""
