"""The build reads setup.cfg; this stub serves tools that still look for it."""

from setuptools import setup

setup()
