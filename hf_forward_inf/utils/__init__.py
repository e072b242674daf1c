"""General helpers, independent of attribution."""
