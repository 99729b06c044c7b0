"""deqcore's own gradient backends, one file each."""
