"""What the console command runs: whole runs, from data to a report."""
