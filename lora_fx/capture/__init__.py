"""From a submodule's real call to a guarded graph; each folder imports only those named before it.

calls/        a call's arguments, the objects among them, the state around it, and why it cannot be captured
reads/        what a forward looked at outside of its arguments, and how a guard compares it
tracing/      the run of a private copy on fake tensors, which writes every torch function into a torch.fx.Graph
captured      the result: a graph and what it relies on
guards        everything that the capture relied on, compiled into one Python function
symbolic      torch.fx's own tracer, without inputs, where it is provably safe
differing     in which integers, a layer's number, two captures of identical blocks differ and in nothing else: later
              ones leave these open (`reads/opennumbers`)
"""
