"""Parts that the recipes of the paper's experiments share."""
