"""What a model costs: multiply-accumulates and milliseconds, and budgets of them."""
