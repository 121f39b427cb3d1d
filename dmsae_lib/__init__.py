"""Distilled Matryoshka sparse autoencoders: the helper library that the notebooks call.

Modules are stacked in floors and import only from floors below their own:

0. ``artifacts``, ``config``
1. ``corpus``, ``language_model``, ``base_model``
2. ``activations``, ``sparsity``, ``sae``
3. ``training``, ``attribution``, ``core``, ``evaluation``
4. ``saebench``, ``summary``, ``claims``, ``plots``, and ``plan`` / ``run_notebook`` behind the Makefile

Importing the package itself imports nothing heavy.
"""

__version__ = "0.1.0"
