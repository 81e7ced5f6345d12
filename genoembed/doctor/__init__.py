"""Known-answer tests: can vectors be trusted here?

The public call is in ``run``, which finds out what is to be tested before torch is imported; the tests are in
``checks``.
"""
