"""Builds the compiled FASTA parser; everything else about the package is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            # No Python module: compiled_fasta.py finds the file by this name and loads it with ctypes.
            "protlm.data._fasta_parser",
            sources=["protlm/data/fasta_parser.cpp"],
            depends=["protlm/data/xxh3.h"],
            language="c++",
            extra_compile_args=["-O3", "-std=c++17"],
            # Without a compiler protlm still installs, and reads FASTA in Python.
            optional=True,
        )
    ]
)
