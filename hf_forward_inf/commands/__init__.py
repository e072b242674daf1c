"""The commands of `hf-forward-inf`: complete runs on a user's data, from loading to the report."""
