"""Attributors side by side: tasks, tables of figures, costs."""
