"""From prompts to images, each with its own random generator."""
