"""What runs without a graph, and a part of the reason that is given; all others run in one."""

from __future__ import annotations

import torch

VALUE = "data-dependent expression"
SIZE = "turns a varying size into a constant"
ASKS = "the forward asks a tensor for "
OUTSIDE = "a tensor is neither an argument nor a parameter, buffer or attribute of the module"
FUNCTORCH = "functorch transform"
OTHER_RESULT = "the graph is not the forward"

REFUSED: dict[str, str] = {
    "ScalesParameterInPlace": "the forward writes to its own parameters",
}
"""What `apply` refuses, and a part of what it says."""

OUTCOMES: dict[str, str] = {
    # values
    "BranchOnValue": VALUE,
    "BranchOnParameter": VALUE,
    "CatchesErrors": VALUE,
    "LoopUntilSmall": VALUE,
    "TensorAsBool": VALUE,
    "TensorAsFloat": VALUE,
    "TensorAsInt": VALUE,
    "TorchCoin": VALUE,
    "ReadsItem": f"{ASKS}item()",
    "ReadsList": f"{ASKS}item()",
    "ReadsNumpy": f"{ASKS}numpy()",
    # sizes
    "SizeAsTensor": SIZE,
    # types and layouts
    "BranchOnContiguity": OTHER_RESULT,
    "ExactType": OTHER_RESULT,
    "SubclassInput": OTHER_RESULT,
    # gradients
    "AsksGradFunction": f"{ASKS}grad_fn",
    "AsksIntermediateRequiresGrad": f"{ASKS}requires_grad",
    "AsksLeaf": f"{ASKS}is_leaf",
    "ScalesGradient": f"{ASKS}requires_grad",
    "SetsData": ASKS,
    "GradientInside": FUNCTORCH,
    "Vmapped": FUNCTORCH,
    # torch 2.9 asks for grad_fn before it sets its hooks
    "Recomputed": "activation checkpointing" if torch.torch_version.TorchVersion(torch.__version__) >= "2.10" else ASKS,
    "RecomputedWithReentry": "an object of type method",
    "ConditionalOperator": "the forward reads G",
    "InferenceInside": "inference mode",
    # luck
    "NumpyGenerator": "the forward reads luck, of type",
    "PythonGenerator": "the forward reads luck, of type",
    "NumpyLuck": "numpy's random",
    "PythonLuck": "Python's random",
    "PythonShuffle": "Python's random",
    "SeedsItself": "other random numbers",
    "TorchGenerator": "the forward reads luck, of type",
    # state
    "CountsCalls": "writes calls to the module",
    "TableThatGrows": "must match the size",
    "CountsInDict": "writes statistics to the module",
    "CountsOnChild": "writes child.calls to the module",
    "KeepsWhatItSaw": "writes seen to the module",
    "TellsAnObserver": "writes observer to the module",
    "ReadsItsOwnDict": "reads all attributes",
    "ReplacesBuffer": "writes last to the module",
    "TableByShape": "unhashable type",
    "BackwardHookIsAdded": "a hook on first",
    "HookIsAdded": "a hook on first",
    "NumpyAttributeChanges": "the forward reads window, of type ndarray",
    "TensorListAttributeChanges": OUTSIDE,
    # weights
    # globals and flags
    "CachedConstant": OUTSIDE,
    "CachedHelper": "unhashable type",
    "CountsInGlobal": "the forward changes CountsInGlobal.calls",
    "GlobalHookIsAdded": "a global module hook",
    "GlobalTensorChanges": OUTSIDE,
    "MutableDefault": "the forward changes the defaults of forward",
    "WritesGlobalList": "the forward changes LOG",
    "ReadsClock": "the forward reads the clock",
    # structures
    "GeneratorArgument": "cannot pickle 'generator' object",
    "AppendsToArgument": "other values in an argument",
    "WritesDictArgument": "other values in an argument",
    "ReturnsSelf": "returns an object of type ReturnsSelf",
    "ReturnsNumbers": "the structure of the result differs",
}

SHARED_OUTCOMES: dict[str, str] = {
    "LayerDrop": VALUE,
    "PythonCoin": "Python's random",
    "PythonCounter": "writes calls to the module",
}
