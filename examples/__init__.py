"""Programs that show the package at work, each a module to run."""
