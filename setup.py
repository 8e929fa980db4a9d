"""Builds l2l_ref; its metadata is in pyproject.toml."""

from setuptools import setup

setup()
