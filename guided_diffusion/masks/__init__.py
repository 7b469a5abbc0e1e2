"""Masks: drawn, or taken from pictures."""
