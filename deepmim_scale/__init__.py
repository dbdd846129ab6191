"""Scaling toolkit for pre-training deep vision transformers by masked image modelling."""
