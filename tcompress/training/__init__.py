"""Loops that change factors by gradients: one file a method, one engine for all of them."""
