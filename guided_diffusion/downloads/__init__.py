"""Fetch the published files to where the configs expect them."""
