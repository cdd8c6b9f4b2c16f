"""The base of the CPU's kernels: how they are compiled, kept on disk, run in parts and given memory."""
