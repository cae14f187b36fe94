"""Losses, schedules, the training step and the loop around it."""
