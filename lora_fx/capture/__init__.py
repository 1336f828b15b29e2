"""From a submodule's real call to a guarded graph.

arguments     flatten a call; say what must hold of its structure
copies        a private copy of the submodule that reports what its forward does
tracer        run the copy on fake tensors and write every torch function into a torch.fx.Graph
guards        everything that the capture relied on, compiled into one Python function
captured      the result: a graph and what it relies on
symbolic      torch.fx's own tracer, without inputs, where it is provably safe
torch_internals   the one file with private torch
"""
