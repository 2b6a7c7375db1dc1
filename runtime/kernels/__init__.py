"""Compiled kernels, one idea a file."""
