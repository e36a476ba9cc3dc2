"""One page of result rows, from files to HTML and Markdown.

`gather` reads the files; `serve` and `selector` each make the section of one bench from its rows, `other` that of a
bench without one of its own; `commits` compares two commits; `page` and `markdown` write what came out. A bench gets a
section by an entry in `sections.SECTIONS`.
"""
