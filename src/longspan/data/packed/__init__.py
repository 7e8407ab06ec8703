"""Rows that are packed on disk, by us or by others: written, found, indexed, read, cut anew."""
