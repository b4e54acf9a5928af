"""What `headwise inspect` says and draws of a file.

facts    what it is, for the terminal: nothing to install for it
budget   a Budget as a page: LU-KV
gates    Gates as a page: LKV
kept     a saved cache as a web page: which words every head has kept
drawing  what both pages are drawn with: matplotlib, which is optional
"""
