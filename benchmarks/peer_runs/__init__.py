"""One small script for each library: `python -m peer_runs.captum TASK METHOD RESULT`, in its own environment."""
