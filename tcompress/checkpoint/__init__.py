"""Files <-> named tensors. Knows no format and no model."""
