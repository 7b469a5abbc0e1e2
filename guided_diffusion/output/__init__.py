"""What a run shows beside its results: the report, the film, the plot of its schedule."""
