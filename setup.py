"""Packaging: the folders at the root install together as one package, ``allometry``."""

from pathlib import Path

from setuptools import setup

ROOMS = (
    *("configs", "scaling", "laws", "data", "models", "parallel", "optim", "trainer"),
    *("interop", "studies", "launch"),
)


def packages() -> dict[str, str]:
    """Map each importable package to its folder, sub-folders that hold code included."""
    found = {}
    for room in ROOMS:
        for init in sorted(Path(room).rglob("__init__.py")):
            folder = init.parent
            found["allometry." + ".".join(folder.parts)] = str(folder)
    return found


setup(
    packages=list(packages()),
    package_dir=packages(),
    package_data={
        "": ["py.typed"],
        "allometry.laws": ["transfers.json"],
        "allometry.scaling.planner": ["published.json"],
        "allometry.configs": ["presets/*.yaml", "presets/ladders/*.yaml", "hardware/*.yaml"],
        "allometry.launch.report": ["page.js", "page.css"],
    },
)
