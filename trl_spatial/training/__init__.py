"""What the trainers share: what they upload, and what they leave in their output folder."""
