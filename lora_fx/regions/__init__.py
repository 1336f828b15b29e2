"""Regions: submodules whose forward runs as guarded graphs.

region       one region at run time: find the graph that fits a call, else run the forward and capture
program      a captured graph made ready to run on a module: adapters injected, compiled, guarded
checking     run graph and forward on the same call and compare them bit by bit
candidates   which submodules are worth a region
install      put regions on a model, share them between identical blocks, take them off
survey       run a model on samples and see which regions become graphs
"""
