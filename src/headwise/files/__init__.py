"""Reading and writing files so that nothing is lost and nothing foreign is run. Knows nothing of caches."""
