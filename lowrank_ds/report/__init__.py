"""Reports of finished, running, broken and resumed runs, from the files they leave: `lowrank-ds report`, `similarity`.

runs.py reads run directories, figures.py draws, page.py writes HTML; similarity.py is the analysis of scaling factors.
Nothing here needs a network or a server. matplotlib and scipy are the extra `report`, imported when used.
"""
