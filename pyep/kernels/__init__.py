"""Kernels, written once in a small language over Numba: see `lang` (the operations) and `op` (how they reach a machine)."""
