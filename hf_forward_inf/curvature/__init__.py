"""Directions of the step that are corrected by the curvature of the training loss."""
