"""Large depthwise convolutions: one operator, several exact backends, a file each."""
