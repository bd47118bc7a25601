"""Renders a page from templates: one file that fetches nothing.

Values are escaped. The content security policy names the hashes of the script and the style, so
nothing else runs even if a text were not escaped.
"""

import base64
import hashlib
import math
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from xlsd_cache.runtime.own_files import GENERATOR

SCRIPT, STYLE = "page.js", "page.css"  # built from web/src


def render(package: str, template: str, **values: Any) -> str:
    """Fill a template of `package`, which may use those of this package."""
    return _environment(package).get_template(template).render(values)


@cache
def _environment(package: str) -> Environment:
    """With its templates compiled once: a page that is followed is rendered often."""
    loader = ChoiceLoader([PackageLoader(package), PackageLoader(__package__)])
    environment = Environment(
        loader=loader, undefined=StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True, auto_reload=False,
    )  # fmt: skip
    environment.globals |= {
        "generator": Markup(GENERATOR),  # noqa: S704 - a constant
        "script": _built(SCRIPT),
        "style": _built(STYLE),
        "script_hash": _hash(_built(SCRIPT)),
        "style_hash": _hash(_built(STYLE)),
    }
    return environment


def short(value: float, digits: int = 5) -> float | None:
    """A number with few digits, for a page's data; None, JSON's null, if it is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


@cache
def _built(name: str) -> Markup:
    text = resources.files(__package__).joinpath("built", name).read_text(encoding="utf-8")
    return Markup(text)  # noqa: S704 - our own file; a test checks that it ends no element


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
