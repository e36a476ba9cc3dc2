"""The selection inside a server: the SGLang plugin and its adapters."""
