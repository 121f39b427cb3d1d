"""Distilled Matryoshka sparse autoencoders: the helper library that the notebooks call.

Modules are stacked in floors and import only from floors below their own:

0. ``provenance``, ``atomic``, ``artifacts``, ``config``, ``seeds``, ``runtime``
1. ``corpus``, ``language_model``, ``base_model`` and its reference ``ngram``
2. ``activations``, ``sparsity``, ``sae``
3. ``gradients``, ``training``, ``attribution``, ``core``, ``evaluation``, ``examples``
4. ``fit`` (train, calibrate, measure, write one SAE), ``arms`` (the control cores), ``saebench``
5. ``summary``, ``claims``, ``reviewers``, ``results``, ``plots`` and its parts, ``readme``, ``sizing`` and its stages

``plan``, ``run_notebook``, ``run_lock`` and ``manage`` stand behind the Makefile.

Importing the package itself imports nothing heavy.
"""

__version__ = "0.1.0"
