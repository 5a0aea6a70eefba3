"""The packages and where they lie; everything else is in pyproject.toml.

`kernels/` and `profiling/` are top-level folders of the project and subpackages of fastdistil. Their bare names belong to
others (a package that transformers imports, a module of Python 3.15), so they are never installed or imported as such.
The links fastdistil/kernels and fastdistil/profiling make the same names work in a checkout that is not installed.
"""

from setuptools import setup

setup(
    packages=["fastdistil", "fastdistil.kernels", "fastdistil.profiling"],
    package_dir={"fastdistil.kernels": "kernels", "fastdistil.profiling": "profiling"},
    package_data={
        "fastdistil": ["py.typed", "recipes/*.yaml"],
        "fastdistil.profiling": ["networks/*.yaml", "static/*", "tables/*.yaml", "templates/*.j2"],
    },
)
