"""Judges of images: rules, detectors, vision-language models, and scene checkers."""
