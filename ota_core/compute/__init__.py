"""How blocks are cut and run on threads and GPUs, and compiled loops whose sums no cut changes."""
