"""CustAny: one reference picture, read by two frozen encoders, enters the word and new attention layers."""
