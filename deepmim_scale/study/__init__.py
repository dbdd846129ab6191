"""Scaling studies: many runs over depths, stages and schedules."""
