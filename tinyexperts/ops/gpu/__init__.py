"""What the operators' Triton kernels share: when they run, and how they are launched."""
