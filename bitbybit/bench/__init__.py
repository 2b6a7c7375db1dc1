"""Measurements: programs side by side, each layer against its bound, start-up and memory."""
