"""Small things with no idea of vision."""
