"""Programs that answer prompts, each in a process and an environment of its own, and how they are asked."""
