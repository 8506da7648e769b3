"""The Jinja templates that the compiler renders, in one folder per backend or kind of output."""
