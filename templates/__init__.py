"""The Jinja templates that the compiler renders, in a folder for each backend and each kind of output."""
