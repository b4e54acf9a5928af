"""Speed and memory, measured next to the full cache and to what the memory's bandwidth allows, in the same run."""
