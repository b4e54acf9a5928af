"""Charts, and what pages are drawn with."""
