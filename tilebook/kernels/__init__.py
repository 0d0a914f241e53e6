"""Kernel families, one file or folder each. Importing one registers its ops; `__all__` names its public functions."""
