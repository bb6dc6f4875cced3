"""An API server, watched: how it is reached, what it sends, and what that means to the store."""
