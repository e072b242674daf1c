"""Compare attributors on a task: metrics, tables and costs."""
