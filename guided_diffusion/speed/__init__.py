"""The same network, computed faster: precision, layers for CPUs, compiler, CUDA graph."""
