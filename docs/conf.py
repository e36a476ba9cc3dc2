"""Sphinx builds the site from these pages: `make docs`."""

from mmtok_deploy import __version__

project = "mmtok-deploy"
version = release = __version__
copyright = "the mmtok-deploy authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
html_theme = "furo"
html_title = "mmtok-deploy"
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
exclude_patterns = ["conf.py"]
