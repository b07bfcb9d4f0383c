"""Runs of `spot train`: a recipe carried out on one process or many, saved, and gone on with."""
