"""`headwise bench`: measure speed and memory, next to the full cache. Every verb has a file."""
