"""What became slower or less accurate: between rows, between commits, over time."""
