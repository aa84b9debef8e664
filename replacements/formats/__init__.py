"""File formats that replacements are read from and written to: one adapter a file."""
