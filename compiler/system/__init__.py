"""Machine services for the compiler: atomic files, a cache, the terminal, Jinja. It knows nothing of topologies."""
