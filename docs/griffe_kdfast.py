"""What griffe cannot see in the source: constructors of losses made of settings, and docstrings as Markdown."""

import ast
import re

import griffe

# A section and its entries: "Args:" and indented "name, name: text" of one or more lines.
SECTION = re.compile(r"^(Args|Returns|Raises|Errors|Attributes):\n((?: {4}.*\n?|\n(?= {4}))+)", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*):", re.MULTILINE)


class Kdfast(griffe.Extension):
    """Shows `@made_of_settings` classes with their constructor, and docstrings without reStructuredText."""

    def on_class(self, *, cls, loader, **kwargs):
        if not any(str(decorator.value).endswith("made_of_settings") for decorator in cls.decorators):
            return
        kind = griffe.ParameterKind.positional_or_keyword
        parameters = [griffe.Parameter("self", kind=kind)]
        for name, attribute in list(cls.members.items()):
            value = str(attribute.value) if attribute.is_attribute and attribute.value else ""
            if value.startswith("setting("):
                default = ast.unparse(ast.parse(value, mode="eval").body.args[0])
                parameters.append(griffe.Parameter(name, annotation=attribute.annotation, kind=kind, default=default))
                cls.del_member(name)
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*parameters), parent=cls))

    def on_object(self, *, obj, loader, **kwargs):
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text):
    """A docstring as Markdown: entries as a list, names as code."""
    text = SECTION.sub(lambda m: f"**{m[1]}**\n\n" + re.sub(r"^ {4}", "", ENTRY.sub(_entry, m[2]), flags=re.M), text)
    text = re.sub(r":(?:class|func|meth|mod):`~?([^`]+)`", r"`\1`", text)
    return re.sub(r"::$", ":", text, flags=re.MULTILINE)


def _entry(match):
    return "    - " + ", ".join(f"`{name}`" for name in match[1].split(", ")) + ":"
