"""Accuracy, foreground, pictures and statistics of models that it is given."""
