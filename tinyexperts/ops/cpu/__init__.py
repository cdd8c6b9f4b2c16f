"""What the CPU's kernels stand on: how they are compiled, kept, run in parts and given memory."""
