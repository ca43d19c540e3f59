"""
DMoERM reward models for TRL. Importing the package registers the model with transformers' Auto classes. The public names are in
`__init__.pyi`; each is imported when it is first used.
"""

import lazy_loader

from .auto_classes import register

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register()
