"""The kernels against straightforward PyTorch: assignment, machine code, a GPU."""
