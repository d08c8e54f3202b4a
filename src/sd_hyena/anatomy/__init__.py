"""What a model's self-attention looks like, and what that says about replacing it."""
