"""Pre-training of one run from the command line to the last checkpoint."""
