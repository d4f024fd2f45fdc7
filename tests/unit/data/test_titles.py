"""Titles that are page script or markup without text, titles that only look so, and entities of HTML."""

from __future__ import annotations

import html
import json
import re
import time
import unicodedata
from html.entities import html5

import pytest

from lwa_helpers import paths
from lwa_helpers.data.amazon import load_amazon
from lwa_helpers.data.titles import mend_title

# The beginning of several thousand titles of the edition of 2018.
GET_TIME = """
 \n\nvar aPageStart = (new Date()).getTime();\nvar ue_t0=ue_t0||+new Date();\n<!-- sp:feature:cs-optimization -->
window.ue_ihb = (window.ue_ihb || window.ueinit || 0) + 1;\nif (window.ue_ihb === 1) {\nvar ue_csm = window"""
SCRIPTS = [
    GET_TIME,
    "var aPageStart = (new Date()).getTime();",
    "var x;",
    "let x = 5",
    "const y = () => { }",
    "function(){ return 1; }",
    "function getTime() {",
    "(function(f){f()})(x)",
    "!function(e,t){",
    "setTimeout(function(){",
    "$(document).ready(function(){",
    "P.when('A', 'jQuery').execute(function(A, $) {",
    "document.write('x')",
    "window.ue_ihb = 1;",
    "if (window.x) { y }",
    "try { x() } catch(e) {}",
    "uet.count('x', 1);",
    "alert('hi');",
    'google_ad_client = "pub";',
    "x = {};",
    "javascript:void(0)",
    "return false;",
    "typeof uet === 'function' && uet('bb')",
    ".a-box { margin: 0 }",
    "body{font-family:Arial}",
    "#nav, #top > a:hover { display:none; }",
    ":root{--x:1}",
    "@media screen { .x { y: z } }",
    "@import url('x.css');",
    "<script>alert(1)</script>",
    "<SCRIPT type='text/javascript'>\nx</SCRIPT >",
    "<script src='x.js'></script>",
    "<script type='text/javascript'>\nvar a",
    "<script",
    "<style>.a{color:red}</style>",
    "<style>\n.x",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "// <![CDATA[ foo // ]]>",
    "/* <![CDATA[ */ x",
    "// <![CDATA",
    "<!-- comment -->",
    "<!-- comment",
    "<!--[if IE]><![endif]-->",
    "<img src=x>",
    "<link rel='x'><meta charset='utf-8'>",
    "<noscript></noscript>",
    "<svg><path d='M0'/></svg>",
    '<div class="a',
]
TEXTS = [
    "JavaScript: The Good Parts (function and style)",
    "Understanding function() in JavaScript; var, let and const",
    "Scientific Calculator, 240 Function(s), function(s) key",
    "How to let go; a memoir",
    "Shirt {Color: Red; Size: L}",
    "T-shirt {color: red}",
    "CSS { display: block; } Pocket Reference",
    "E=mc2; the story of = and ;",
    'Size: 5" = 12cm; Weight: 3kg;',
    "Learning the <script> tag (2nd Edition)",
    "Learning the <script>",
    "<script> tag handbook",
    "Scripture <scripture>: A Reader",
    "HTML5 <canvas> Book",
    "I <3 You, a < b > c",
    "Sticks to any window.Reusable (10 pack)",
    "window.document.pdf (2 copies)",
    "if (you) only, while (Live) [Remastered]",
    "for (Men) {12 oz}",
    "Do {Not} Disturb, Try {Deluxe}, The Else {Special Edition}",
    "Date & Time = Money",
    "GetTime Watch, Var (France)",
    "True",
    "None of Us",
    "[REC]",
    "{Poster}",
    "1984",
]


@pytest.mark.parametrize("title", SCRIPTS)
def test_a_title_that_is_script_or_markup_alone_is_none(title):
    assert mend_title(title) == ("", ["script_titles"]) == mend_title(f"\n {title}\n")


@pytest.mark.parametrize("title", TEXTS)
def test_a_title_that_only_looks_like_script_stays(title):
    assert mend_title(title) == (title, [])


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Pens <script>var x=1</script> Ink", "Pens Ink"),
        ("Pens <style>p{}</style>", "Pens"),
        ("Pens <script src='x'>", "Pens"),
        ("Pens <script> var x = 1;", "Pens"),
        ("Pens <!-- a comment --> Ink", "Pens Ink"),
        ("Pens // <![CDATA[ foo() // ]]>", "Pens"),
        ("<![CDATA[Pens & Ink]]>", "Pens & Ink"),
    ],
)
def test_text_beside_script_stays(raw, clean):
    assert mend_title(raw) == (clean, ["html_titles"])


def test_titles_that_are_script_are_counted_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    reviews = [{"reviewerID": "u", "asin": i, "overall": 5.0, "unixReviewTime": 1_400_000_000} for i in "abcd"]
    titles = {"a": "Pens", "b": GET_TIME, "x": GET_TIME, "c": "<style>a{}</style>", "d": "Ink &amp;amp; Co"}
    (tmp_path / "Toys.json").write_text("".join(json.dumps(one) + "\n" for one in reviews))
    items = "".join(json.dumps({"asin": item, "title": title}) + "\n" for item, title in titles.items())
    (tmp_path / "meta_Toys.json").write_text(items)
    with pytest.warns(UserWarning, match="meta_Toys.json: 2 titles that are page script") as caught:
        data = load_amazon(tmp_path, "Toys", k=0)
    assert data.warnings == [str(one.message) for one in caught] and "(first: line 2)" in data.warnings[0]
    assert data.titles == ["Pens", "Item b", "Item c", "Ink & Co"] and data.items.title.isna().tolist() == [0, 1, 1, 0]
    assert data.report["script_titles"] == data.report["untitled_items"] == 2 and data.report["html_titles"] == 1


def test_only_entities_that_end_in_a_semicolon_are_resolved():
    for name in {name.removesuffix(";") for name in html5}:
        assert mend_title(f"Pen&{name}book") == (f"Pen&{name}book", [])
    for name in ("notit;", "bogus;", ";", "#;", "#x;", "Amp;", "#xg;"):
        assert mend_title(f"Pen&{name} book") == (f"Pen&{name} book", [])


def test_whole_entities_are_those_of_html():
    for name, character in html5.items():
        if name.endswith(";") and character.isprintable() and not re.search(r"[&<\s]", character):
            assert mend_title(f"a&{name}b") == (f"a{character}b", ["html_titles"])
    for code in [*range(0x21, 0x26), *range(0x80, 0x100), 0x2603, 0x1F600]:
        expected = " ".join(html.unescape(f"a&#{code};b").split()).replace("\xad", "")
        if "C" not in {unicodedata.category(c)[0] for c in expected}:
            assert mend_title(f"a&#{code};b")[0] == mend_title(f"a&#x{code:x};b")[0] == expected


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Salt &amp; Pepper", "Salt & Pepper"),
        ("Salt &amp;amp; Pepper", "Salt & Pepper"),
        ("5&amp;quot; x 7&amp;amp;quot;", '5" x 7"'),
        ("AT&amp;T &amp;lt;b&amp;gt;Phone&amp;lt;/b&amp;gt;", "AT&T Phone"),
        ("a&#0;b&#1;c&#55296;d&#99999999;e&#x202e;f", "abcdef"),
        ("one&#10;two&nbsp;three", "one two three"),
    ],
)
def test_entities_of_entities_and_of_what_is_no_character(raw, clean):
    text, flaws = mend_title(raw)
    assert text == clean == mend_title(text)[0] and flaws[0] == "html_titles"


@pytest.mark.parametrize(
    "piece", ["<script>", "<!--", "// <![CDATA", "&amp;", "<a ", "{", "[", ".a ", "if(", "a.b", "<"]
)
def test_no_title_takes_long(piece):
    start = time.process_time()
    assert len(mend_title(piece * 200_000)[0]) <= 200
    assert time.process_time() - start < 1
