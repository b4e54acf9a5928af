"""What `headwise inspect` says and draws of a file, and `headwise report` of evaluations.

facts    what it is, in plain values: nothing to install for it
told     the same in a few lines, for the terminal
budget   a Budget as a page: LU-KV
gates    Gates as a page: LKV
kept     a saved cache as a web page: which words every head has kept
drawing  what both pages are drawn with: matplotlib, which is optional

results  `headwise report`: folders of `headwise eval` in, a page, CSV, Markdown and a picture out
records  reads and checks them; statistics, cells and summary count
page     the page; tables, markup, notes, charts and svg are its parts, picture the PNG

speed    the same of files of `headwise bench`, which benchmarks reads; curves are what is drawn
"""
