"""Whether a model fits, and how long its context may be: without a GPU and without weights."""
