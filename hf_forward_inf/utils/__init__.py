"""Helpers that know nothing of attribution."""
