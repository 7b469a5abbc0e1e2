"""Results measured: metrics, their tables, the paper's."""
