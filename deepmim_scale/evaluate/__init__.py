"""Frozen features, and probes of how good they are."""
