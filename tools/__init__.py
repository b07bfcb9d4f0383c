"""Scripts that build, check and document this repository."""
