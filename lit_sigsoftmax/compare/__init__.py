"""Head to head: one recipe trained with several output layers over several seeds, and the report of what came out.

``command.compare`` trains, ``report.report`` reports; nothing is imported here, so that a run started by a comparison
does not pay for SciPy.
"""
