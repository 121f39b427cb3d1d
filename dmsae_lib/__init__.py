"""Distilled Matryoshka sparse autoencoders: the helper library that the notebooks call.

A folder is a room, and a room uses only rooms below its own (a test holds every import to that):

9. ``command``    what the Makefile calls: the plan, running a notebook, managing a run
8. ``figures``    pictures, from results alone
7. ``report``     from numbers to claims, tables and pages
6. ``distill``    the paper's loop: attribution, the core, its controls, fitting SAEs, measuring them
   ``saebench``   the sae_bench package on our SAEs
5. ``interop``    SAEs from and for other libraries
4. ``sae``        the SAE with a core and its training step: the page to read first is ``sae.step``
   ``embedded``   how the embedded language model was made
3. ``data``       text, tokens, the language model, residuals
2. ``config``     what a run is and where it lies
1. ``store``      folders that are written whole or not at all, provenance, random streams, the process

Importing the package itself imports nothing heavy.
"""

__version__ = "0.1.0"
