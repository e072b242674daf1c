"""What ForwardInf does beyond Algorithm 1: streams, tuning, token scores, self-influence, export to PEFT."""
