"""deqcore's own cores, one file each."""
