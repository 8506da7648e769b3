"""The one Jinja environment that every renderer shares."""

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def environment() -> Environment:
    """The Jinja environment for the `surgeon.templates` package.

    A name that a template uses but the renderer did not supply is an error; a line that holds only a tag leaves no
    trace in the text. Values are escaped in HTML and nowhere else, since all other output is source code.
    """
    return Environment(
        loader=PackageLoader("surgeon.templates", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
    )


def render_template(name: str, /, **values: object) -> str:
    """Renders one template, for example `gpu/prefill.py.jinja`, with `values` filled in."""
    return environment().get_template(name).render(**values)
