"""Foundations every room stands on: errors, units, configuration, files, records, run folders, progress.

Nothing here knows about tokens, tensors or models, and nothing here imports another room.
"""
