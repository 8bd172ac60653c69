"""A whole step captured as one graph, and its replay."""
