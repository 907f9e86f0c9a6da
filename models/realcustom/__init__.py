"""RealCustom++: a projector of cross-layer, cross-scale features, masks of a real word, the release's schedule."""
