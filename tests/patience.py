"""How long a test waits for what must come."""

PATIENCE_SECONDS = 600.0
"""Longer than the slowest machine needs beside other work. Where all is well nothing waits for so long."""
