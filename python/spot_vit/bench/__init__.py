"""What `spot bench MODEL` does: one model in every runtime, dense beside sparse, in turns."""
