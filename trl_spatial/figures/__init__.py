"""Pictures of pairs and of rollouts: what a person looks at."""
