"""Code shared by the trainers: uploads, and the output folder of a run."""
