"""Offline preference optimization of text-to-image models."""
