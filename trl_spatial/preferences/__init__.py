"""What a row of a preference dataset is: its columns, its images, and what can be wrong with them."""
