"""The machinery of the trainers: processes, checkpoints, buffers, memory, logs. The algorithms are in the folder above."""
