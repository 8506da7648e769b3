"""What the compiler needs of the machine: atomic files, a cache, a terminal, Jinja. It knows nothing of topologies."""
