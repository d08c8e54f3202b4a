"""Functions on tensors: a naive reference for each, and the fast version held to it."""
