"""vLLM's plugin: the same package of kernels under vLLM's engine. Importing it imports no vLLM."""


def register() -> None:
    """Registers the plugin in this process; vLLM calls it in the server, the engine and every worker.

    Without a package, vLLM goes on with its own attention.
    """
    from surgeon.runtime.vllm.hooks import install

    install()
