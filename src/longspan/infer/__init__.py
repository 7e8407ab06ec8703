"""Use a model without training it: score given answers, per-token losses, greedy generation."""
