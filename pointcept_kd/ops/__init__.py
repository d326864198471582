"""Pure tensor functions; nothing here knows the rest of the package."""
