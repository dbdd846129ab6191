"""One command before the first run: what works on these machines, and remedies for the rest."""
