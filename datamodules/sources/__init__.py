"""Reading and checking of files, one module per kind of source."""
