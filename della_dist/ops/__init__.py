"""Pure mathematics: Philox, ranking, MagPrune, elect and fuse; Numba and torch backends."""
