"""The folder of a run: its lock, its checkpoints' states, what may go on in it. No torch."""
