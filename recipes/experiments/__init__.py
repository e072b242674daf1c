"""Whole runs, from data to a report: what the recipes and the console command start."""
