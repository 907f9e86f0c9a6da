"""CustomNet: view, place and background of an object."""
