"""The layout map: ``kernels/`` becomes ``shampoo.kernels`` and ``csrc/`` ``shampoo.csrc``."""

from setuptools import setup

setup(
    packages=["shampoo", "shampoo.kernels", "shampoo.csrc"],
    package_dir={"shampoo": "shampoo", "shampoo.kernels": "kernels", "shampoo.csrc": "csrc"},
    package_data={
        "shampoo": ["py.typed", "*.json"],
        "shampoo.csrc": ["*.cpp", "*/*.h", "*/*.cpp", "*/*.cu"],
    },
    include_package_data=False,
)
