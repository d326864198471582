"""Scene completion: a diffusion teacher that fills in a sparse scan, and few-step students distilled from it.

A file holds the functions of its part first and the classes that configs name after them. A denoiser is any callable
`(x (n, 3), t (b,) int64) -> (n, 3)`: networks are met in a config, by registered name.

Every file of this folder is imported when the package is. An import error in such a file is raised, not swallowed.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
