"""Parts that models are made of: attention, evidence, predictors, decisions, pooling."""
