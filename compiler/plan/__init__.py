"""Plans: the gain and the cost to expect of a model on this machine, before anything is learned."""
