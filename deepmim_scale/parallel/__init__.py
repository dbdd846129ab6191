"""Stages of a pipeline in real processes: messages, execution, DeepSpeed's engine."""
