"""One loop, one config and one checkpoint layout for every trained method; of the host it knows nothing."""
