"""Triton kernels. Each has a twin in plain PyTorch that it is held to: in Triton's interpreter on any machine
(``TRITON_INTERPRET=1``), and compiled where there is a GPU."""
