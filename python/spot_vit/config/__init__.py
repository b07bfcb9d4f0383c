"""Configurations as plain data; nothing here imports torch."""
