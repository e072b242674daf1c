"""What ForwardInf does beyond the algorithm: streams, tuning, tokens, self-influence, export."""
