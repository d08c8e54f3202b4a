"""Triton kernels. Each is held to the same in plain PyTorch: in Triton's interpreter on any machine
(``TRITON_INTERPRET=1``), and compiled where there is a GPU."""
