"""Show a file (`headwise inspect`), and report evaluations and benchmarks (`headwise report`).

inspect/   facts    what a file is, in plain values; nothing to install for it
           summary  the same in a few lines, for the terminal
           budget   a Budget as a page: LU-KV
           gates    Gates as a page: LKV
           kept     a saved cache as a web page: which words every head has kept

quality/   results  folders of `headwise eval` in; a page, CSV, Markdown and a picture out
           records  reads and checks them; statistics, cells and summary count
           page     the page, with tables and notes

speed/     speed    the same for files of `headwise bench`, which benchmarks reads; curves are its charts

draw/      charts, svg and markup for pages; picture and drawing need matplotlib, which is optional
"""
