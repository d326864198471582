"""Distillers: a frozen teacher, a student, and the terms that pull one towards the other.

Every file of this folder is imported when the package is, so that a new term is one new file. An import error in
such a file is raised, not swallowed.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
