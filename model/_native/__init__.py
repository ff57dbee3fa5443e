"""Compiled extensions; `make build` puts them here."""
