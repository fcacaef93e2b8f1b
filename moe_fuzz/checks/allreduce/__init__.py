"""Checks of allreduce_rmsnorm: what one rank gets, and that all get the same."""
