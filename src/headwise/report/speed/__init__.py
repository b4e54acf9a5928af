"""`headwise report` of files of `headwise bench`."""
