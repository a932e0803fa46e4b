"""The layout map: ``kernels/`` becomes ``shampoo.kernels`` and ``csrc/`` ``shampoo.csrc``."""

from setuptools import find_packages, setup

# The links that stand in a checkout for the two mapped folders are left out: setuptools would
# follow them, and install each file twice.
OURS = find_packages(include=["shampoo*"], exclude=["shampoo.kernels*", "shampoo.csrc*"])
KERNELS = ["shampoo.kernels", *(f"shampoo.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*OURS, *KERNELS, "shampoo.csrc"],
    package_dir={"shampoo": "shampoo", "shampoo.kernels": "kernels", "shampoo.csrc": "csrc"},
    package_data={
        "shampoo": ["py.typed"],
        "shampoo.ops": ["*.json"],
        "shampoo.roots": ["*.json"],
        "shampoo.csrc": ["*.cpp", "*/*.h", "*/*.cpp", "*/*.cu"],
    },
    include_package_data=False,
)
