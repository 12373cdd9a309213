"""From a prompt to an image: every image has a random generator of its own."""
