"""What to expect of a model on a machine: measurements, headers, and the arithmetic between them."""
