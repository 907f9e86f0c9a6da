"""PhotoMaker and InstantID: identity encoders for people."""
