"""Step 3 of the algorithm: the candidates are forwarded, batch by batch, cached."""
