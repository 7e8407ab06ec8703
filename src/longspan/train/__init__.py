"""Staged training over packed rows: configuration, batches, objectives, optimizers, checkpoints, one loop."""
