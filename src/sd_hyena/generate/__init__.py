"""From a prompt to pictures: settings, and the drawing itself."""
