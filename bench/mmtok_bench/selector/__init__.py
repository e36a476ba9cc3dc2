"""`mmtok bench selector`: how long the selection takes, beside the published loop.

`bench` times the `contestants` case by case; `timing` makes synthetic features and takes times in turns.
"""
