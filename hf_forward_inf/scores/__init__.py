"""What is done with scores: corrections, measures against known proponents or retraining."""
