"""Tuning on the GPUs of a Ray cluster: the searches and the registry stay here, compilers and GPUs are actors there."""
