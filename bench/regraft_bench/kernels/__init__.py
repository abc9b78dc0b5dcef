"""The kernels beside what one would write by hand: assignment, machine code, a GPU."""
