"""Where the packages lie; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    # `kernels/` itself is no package: PyPI has one of that name, which it would shadow.
    # `ds_configs/` becomes one, so that an installation finds the JSON files without a clone.
    packages=[
        *find_packages(include=["deepmim_scale", "deepmim_scale.*"]),
        "deepmim_scale.ds_configs",
        "deepmim_kernels",
    ],
    package_dir={
        "deepmim_scale.ds_configs": "ds_configs",
        "deepmim_kernels": "kernels/deepmim_kernels",
    },
    package_data={
        "deepmim_scale": ["py.typed", "data/*.c"],
        "deepmim_scale.ds_configs": ["*.json"],
        "deepmim_kernels": ["py.typed"],
    },
)
