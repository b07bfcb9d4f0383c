"""Files, modes, timing, tables: what every other package may use."""
