"""Schedules as data: built, checked, simulated, drawn, read and written. No torch."""
