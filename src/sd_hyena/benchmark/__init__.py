"""Time, memory and parameters of self-attention and what may replace it, checked before they are compared."""
