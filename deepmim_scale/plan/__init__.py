"""Costs, cuts and predictions: what to run on which machines. No torch."""
