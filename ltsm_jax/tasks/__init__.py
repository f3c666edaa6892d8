"""Tasks: what a batch is to a model's loss, and what a split is to its score."""
