"""Checkpoints: read safely, compared with a network, loaded into it."""
