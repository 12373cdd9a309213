"""Building a preference dataset: prompts, their perturbations, images of both, a filter, reviewers, and the export."""
