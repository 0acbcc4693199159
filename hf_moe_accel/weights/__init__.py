"""Station 4, weights move: the live model's tensors become the files of a standard checkpoint."""
