"""What GRPO runs on: processes, checkpoints, buffers, memory, logs. The algorithm is in the folder above."""
