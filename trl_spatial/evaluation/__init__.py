"""Measures what a reward model or an image generator knows about space, with the uncertainty of every number."""
