"""Distilled Matryoshka sparse autoencoders: the helper library that the notebooks call.

Modules are stacked in floors and import only from floors below their own (a test holds them to it):

0. ``provenance``, ``atomic``, ``seeds``, ``layout``, ``house_style``
1. ``artifacts``, ``runtime`` and ``settings``, then ``config``, which checks a YAML file read by ``config_file``
2. ``text_files``, ``corpus``, ``model_checks``, ``language_model``, ``base_model`` and its reference ``ngram``
3. ``activations``, ``prefetch``, ``sparsity``, ``sae``, ``workers``
4. ``entries`` (products with sparse activations), ``reference`` (the plain training step), ``attribution``, ``evaluation``,
   ``examples``
5. ``gradients`` (the training step), ``core``, ``interop`` and its parts (the formats of other libraries)
6. ``training``, ``arms`` (the control cores), ``identity`` (of cores across chains), ``core_format``, ``saebench`` and its parts
7. ``fit`` (train, calibrate, measure, write SAEs)
8. ``verdicts``, ``equal_l0``, ``regime``, ``claims``, ``scores``, ``reviewers``, ``agreement``, ``summary``, ``results``,
   ``plots`` and its parts, ``sizing`` and its stages, ``readme``, ``hub``

``plan``, ``run_notebook``, ``run_lock`` and ``manage`` stand behind the Makefile.

Importing the package itself imports nothing heavy.
"""

__version__ = "0.1.0"
