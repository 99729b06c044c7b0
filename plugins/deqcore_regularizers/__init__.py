"""deqcore's own regularizers, one file each."""
