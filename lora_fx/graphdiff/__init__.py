"""How two models' graphs differ, and what adapters have become.  In the order in which the files need each other:

graphs, align, naming, changes   two graphs as data, which node is which, what differs; no torch
render                                  what differs as text, JSON, page, picture and graph; no torch
diff                                    two graphs → GraphDiff, whose methods call all of these; no torch
nodefacts, costs, canonical             a torch.fx graph as statements
programs, models                        models, GraphModules, exported programs → graphs
deltas                                  an adapted model → norms and singular values, and their pictures
"""
