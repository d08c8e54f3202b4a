"""A local page: a picture with attention and with Hyena layers, side by side. gradio is imported here alone."""
