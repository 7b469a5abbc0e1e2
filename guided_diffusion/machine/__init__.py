"""What the program needs of the machine: files, other ranks, signals, memory."""
