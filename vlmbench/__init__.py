"""vlmbench: acceleration methods for vision-language models, compared on the same samples."""

__version__ = "0.1.0"
