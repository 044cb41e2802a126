"""One file per arrow from a checkpoint to a smaller one and back; the only room that joins the others."""
