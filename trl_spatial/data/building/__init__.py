"""Building a preference dataset: prompts, perturbations, images of both, filtering, human review, and export."""
