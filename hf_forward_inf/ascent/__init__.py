"""Step 2 of the algorithm: a copy of the model is moved up the loss of a query."""
