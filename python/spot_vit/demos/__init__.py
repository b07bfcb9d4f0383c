"""Demonstrations that train on ClutteredDigits."""
