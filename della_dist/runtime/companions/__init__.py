"""The files beside the weights: which are carried to OUT, and what experts' files say otherwise."""
