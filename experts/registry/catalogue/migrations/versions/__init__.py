"""One file for each version of the catalogue's schema."""
