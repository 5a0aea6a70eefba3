"""The packages and where they lie; everything else is in pyproject.toml.

`kernels/` and `profiling/` are top-level folders of the project and subpackages of fastdistil. Their bare names belong to
others (a package that transformers imports, a module of Python 3.15), so they are never installed or imported as such.
The links fastdistil/kernels and fastdistil/profiling make the same names work in a checkout that is not installed.
"""

from setuptools import setup

ROOMS = ("data", "models", "gradients", "distributed", "launch", "training", "studies", "install")

setup(
    packages=[
        "fastdistil",
        *(f"fastdistil.{room}" for room in ROOMS),
        "fastdistil.kernels",
        "fastdistil.profiling",
        "fastdistil.profiling.report",
    ],
    package_dir={"fastdistil.kernels": "kernels", "fastdistil.profiling": "profiling"},
    package_data={
        "fastdistil": ["py.typed", "recipes/*.yaml"],
        "fastdistil.install": ["*.patch"],
        "fastdistil.launch": ["templates/*.j2"],
        "fastdistil.profiling.report": ["static/*", "templates/*.j2"],
        "fastdistil.studies": ["networks/*.yaml", "tables/*.yaml"],
    },
)
