"""Numerical blocks that know tensors and nothing else: attention, RoPE parameters, linear cross-entropy."""
