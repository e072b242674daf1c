"""Small real models that are trained in minutes, for recipes and tests without a model."""
