"""Training of a denoiser: losses, moving averages, data and the loop."""
