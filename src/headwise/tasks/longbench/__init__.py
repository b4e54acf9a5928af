"""LongBench and LongBench-E (arXiv 2308.14508)."""
