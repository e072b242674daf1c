"""Small real models, trained in minutes, for recipes and tests that are given no model."""
