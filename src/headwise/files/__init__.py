"""Read and write files so that nothing is lost and no foreign code is run. Knows nothing of caches."""
