"""Rows of a preference dataset: their columns and images, and what can be wrong with them."""
