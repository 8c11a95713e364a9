"""Merges of merges: stages made beside OUT, one after another, before what is merged of them."""
