"""The benchmark suite: what reproduces the papers and compares methods, over one runner."""
