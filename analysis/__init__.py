"""What you look at afterwards."""
