"""Finding, comparing and swapping faces."""
