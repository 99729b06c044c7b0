"""deqcore's own solvers, one file each."""
