"""What no paper owns: parts and recipes, runs, checkpoints, statistics, claims."""
