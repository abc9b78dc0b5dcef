"""FAST: a zero head and two learning rates, and the recorder of what would be deployed at any time."""
