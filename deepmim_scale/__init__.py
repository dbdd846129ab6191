"""Scaling toolkit for pre-training deep vision transformers by masked image modelling."""

__version__ = "0.1.0"
