"""deqcore's own linear solvers, one file each."""
