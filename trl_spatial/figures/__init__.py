"""Pictures of pairs and rollouts, charts, and pages for people to look at."""
