"""Result rows as tables and plots: in the terminal, as one HTML page, as Markdown.

`frame` reads rows into a DataFrame. `serve`, `quality` and `selector` each make the section of one benchmark from it.
`document` joins the sections, with a plain table for any other benchmark. `commits` compares two commits. `page` writes
HTML, `tables` writes Markdown and text for a terminal.
"""
