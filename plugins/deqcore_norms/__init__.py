"""deqcore's own weight normalisations, one file each."""
