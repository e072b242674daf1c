"""Step 3 of Algorithm 1: cached forward passes over all candidates, batch by batch."""
