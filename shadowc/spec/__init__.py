# SPDX-License-Identifier: Apache-2.0
"""The contracts of shadowc as data: operators, options, engine manifest, errors. Imports nothing heavy."""
