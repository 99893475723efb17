"""The method of the paper: probability path, noise, rollouts, losses."""
