"""How far a picture is from the truth: per pixel, by structure, and as a network sees it."""
