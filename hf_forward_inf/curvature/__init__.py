"""Directions of the ascent's steps that are corrected by the curvature of the training loss."""
