"""Online deep RL on Gymnasium environments."""
