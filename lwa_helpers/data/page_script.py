"""Page script in place of text: crawled fields may hold the JavaScript or CSS of the page, with or without tags."""

from __future__ import annotations

import re

CHECKED = 2000  # characters; page script shows itself at once
REMOVED = re.compile(
    r"<!--.*?(?:-->|\Z)|(?://|/\*)\s*<!\[CDATA.*?(?:\]\]>(?:\s*\*/)?|\Z)"
    r"|<(?P<name>script|style)\b(?P<attributes>[^>]*)(?:>(?P<inside>.*?)(?:(?P<end></(?P=name)\s*>)|\Z)|\Z)",
    re.DOTALL | re.IGNORECASE,
)
CDATA = re.compile(r"<!\[CDATA\[|\]\]>")
ANY_TAG = re.compile(r"<[/!?]?\[?[a-z][^<>]*>|<[a-z][\w-]*\s+[\w-]+=[^<>]*\Z", re.IGNORECASE)
HINT = re.compile(r"[{;=]|\(\)|\([\"'$]|script:|\bfunction")
CSS_PROPERTY = (
    "-|align|animation|background|border|bottom|box|clear|color|content|cursor|display|fill|flex|float|font|grid|height|"
    "justify|left|letter|line|list|margin|max|min|opacity|outline|overflow|padding|pointer|position|right|stroke|text|"
    "top|transform|transition|vertical|visibility|white|width|word|z|zoom"
)
# Each is something that no product is called. English comes close: "function(s)", "let go;", "{Color: Red}".
SCRIPT = re.compile(
    rf"""
      \b(?:var|const)\s+[\w$]+\s*(?:=[^=]|;|,\s*[\w$]+\s*[=,;])        # var a = 1   var a, b;
    | \blet\s+[\w$]+\s*=[^=]
    | \bfunction\b\s*[\w$]*\s*\([\w$,\s]{{0,200}}\)\s*\{{               # function f(a, b) {{
    | (?:^|[(=!,;:&|?])\s*function\s*\((?!s\))                          # (function(
    | =>\s*\{{
    | \bnew\s+(?:Date|Image|Array|Object|XMLHttpRequest)\(             # new Date(
    | \.getTime\(\)
    | \b(?:if|while|switch|catch)\s?\([^{{}}]{{0,200}}\)\s*\{{          # if (a) {{
    | \bfor\s?\((?:var|let|const|;|[\w$]+\s*=)
    | \b(?:try|else|do|finally)\s*\{{
    | \breturn\s+(?:true|false|null|this)\s*;
    | \bjavascript:\w+\(
    | \btypeof\s+[\w$.]+\s*[!=]==?
    | \bdocument\.(?:write|get|query|create|cookie|body|location|title|add)\w*\s*[(=.\[]
    | \bwindow\.[\w$]+\s*(?:[!=]?==?|\|\||&&)
    | \bwindow\.(?:location|open|add\w+|on\w+)\s*[(=.]
    | \b(?:console|navigator)\.[a-zA-Z]+\s*[(.=]
    | \$\(\s*(?:document|window|this|function|["'])                    # $(document)
    | \.(?:ready|execute|register|addEventListener)\(\s*["'(\w]
    | ^\s*[\w$]+(?:\.[\w$]+)+\s*=[^=\n][^\n]{{0,500}};\s*$              # a.b = 1;
    | ^\s*[\w$]+\s*=\s*(?:["'\[({{]|new\b|true\b|false\b|null\b)[^\n]{{0,500}};\s*$
    | ^\s*(?:[\w$]+\.){{0,5}}[\w$]+\((?!\d+\);)[^\n]{{0,500}}\);\s*$    # a.b(c);
    | @(?:media|import|font-face|charset|keyframes|supports)\b[^;{{\n]{{0,200}}[;{{]
    | (?:[.\#][A-Za-z_-][\w-]*|\b(?:html|body|div|span|img|table|t[dr]|[uo]l|li|input|button|h[1-6]|a|p)\b|:root|\*)
      [\w\s.,\#>+~:()*-]{{0,200}}\{{\s*-?(?:{CSS_PROPERTY})[a-z-]*\s*:  # .a, p {{color:
    """,
    re.VERBOSE | re.MULTILINE,
)


def is_script(text: str) -> bool:
    """Whether a text is JavaScript or CSS, as far as its first 2,000 characters show."""
    return bool(HINT.search(text, 0, CHECKED) and SCRIPT.search(text, 0, CHECKED))


def without_script(text: str) -> str:
    """Remove comments, script and style elements, also those whose end was cut off, and the marks of CDATA sections."""
    return CDATA.sub(" ", REMOVED.sub(_text_instead, text))


def _text_instead(found: re.Match[str]) -> str:
    """Return a space; for an opening tag alone before text, as in the title of a book about the tag, the match."""
    inside = found["inside"] or ""
    if not found["name"] or found["end"] or "=" in found["attributes"] or is_script(inside):
        return " "
    alone = not found.string[: found.start()].strip()
    code = not inside.strip() or inside.startswith("\n") or any(sign in inside for sign in ";={(")
    return " " if alone and code else found[0]


def has_text(text: str) -> bool:
    """Whether a text has a letter or digit outside tags."""
    return any(map(str.isalnum, ANY_TAG.sub(" ", text)))
