"""`mmtok bench selector`: times the selection by itself, and the published loop.

`bench` times the `contestants` case by case; `timing` makes synthetic features and takes times in turns.
"""
