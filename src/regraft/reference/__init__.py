"""The papers line by line: slow, obvious, what everything else is checked against."""
