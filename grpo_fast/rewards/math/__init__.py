"""Mathematical accuracy: finding the final answer, reading it, comparing it with the gold answer."""
