"""Correct scores, and measure them against known proponents or against retraining."""
