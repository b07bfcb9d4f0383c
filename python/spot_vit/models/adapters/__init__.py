"""Adapters: one module per family of timm models; `find` says which one a module gets."""
