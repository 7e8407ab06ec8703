"""Estimates before anything runs: communication, memory and time of a model at a context length on given hardware."""
