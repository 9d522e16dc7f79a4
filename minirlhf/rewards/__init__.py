"""How good is a reward: distances, regret, consistency, calibration, over-optimisation."""
