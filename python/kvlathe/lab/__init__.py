"""The laboratory: what researchers use, and the run time never imports.

`evaluation` holds caches against the exact one, `baselines` has other people's methods to hold ours against, and
`retrieval` hides needles in long texts.
"""
