"""What is for the work on the package and no part of it."""
