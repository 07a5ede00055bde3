# SPDX-License-Identifier: Apache-2.0
"""Quality of a model under masks: on texts, on WikiText and on tasks with choices, in torch and on engines.

`model.py` says what is evaluated, a `Corpus` on what, a `Setting` under which masks; `run.py` brings them together.
"""
