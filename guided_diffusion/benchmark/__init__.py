"""How fast a network runs on this machine."""
