"""Measure what a model does with its context; one JSON record a sample is the product."""
