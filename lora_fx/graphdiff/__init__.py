"""How two models' graphs differ, and what adapters have become.

Without torch:
graphs      a graph as data, saved as JSON
align       which node of one graph is which of another
naming      lines of code with names that agree on both sides
compare     two graphs → GraphDiff
patch       a GraphDiff applied to a graph
difftext, jsonform, html, svg, mermaid, dot   a GraphDiff, shown
blocks, layout, page                          what the pictures share
spectra, heatmaps                             norms and singular values of adapters, as data and pictures

With torch:
canonical, nodefacts, costs   a torch.fx graph as statements
models, programs              models, GraphModules, exported programs → graphs
deltas                        an adapted model → norms and singular values
"""
