"""Step 2 of Algorithm 1: move a copy of the model's parameters up the loss of a query."""
