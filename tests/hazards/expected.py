"""What runs without a graph, and a part of the reason that is given; all others run in one."""

from __future__ import annotations

VALUE = "data-dependent expression"
SIZE = "turns a varying size into a constant"
ASKS = "the forward asks a tensor for "
OUTSIDE = "a tensor is neither an argument nor a parameter, buffer or attribute of the module"
FUNCTORCH = "functorch transform"
OTHER_RESULT = "the graph is not the forward"

HELD = "what the module holds in containers, objects and functions is not guarded yet"
AROUND = "what lies outside of the module is not guarded yet"
STRUCTURE = "the structure of the module is not guarded yet"
OPEN: dict[str, str] = {
    **dict.fromkeys(
        (
            "KeepsWhatItSaw", "TellsAnObserver", "NestedConfigurationChanges", "NamespaceChanges",
            "DictAttributeChanges", "SetAttributeChanges", "FunctionAttributeChanges", "PartialAttributeChanges",
            "EnumAttributeChanges", "ReadsItsOwnDict", "TensorAttributeAppears", "ParameterBecomesNone", "LoadsLazily",
        ),
        HELD,
    ),
    **dict.fromkeys(
        (
            "GlobalNumberChanges", "GlobalListChanges", "GlobalDictChanges", "GlobalFunctionChanges",
            "GlobalNumberInHelper", "GlobalModuleAttributeChanges", "WritesGlobalList", "ClosureChanges",
            "DefaultArgumentChanges", "EnvironmentChanges", "ReadsClock", "AsksDeterminism", "AsksBackendFlag",
            "FunctionIsPatched", "NumpyLuck",
        ),
        AROUND,
    ),
    **dict.fromkeys(
        (
            "LinearIsReplaced", "LayersAreAdded", "LayersAreAppended", "StepsAreAppended", "MethodIsReplaced",
            "ForwardIsReplaced",
        ),
        STRUCTURE,
    ),
    "InferenceInside": "inference mode inside a forward is not seen yet",
    "Spectral": "reading a parametrized weight runs its parametrization",
    "ScalesParameterInPlace": "the forward writes to a parameter, and planning runs it",
}  # fmt: skip
"""Known to be silently wrong, each a strict xfail: a fix must take it off this list."""

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
    "SizeArithmetic": "symbolically traced variables",
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
    "Recomputed": "activation checkpointing",
    "RecomputedWithReentry": "an object of type method",
    "ConditionalOperator": OTHER_RESULT,
    # luck
    "NumpyGenerator": OTHER_RESULT,
    "PythonGenerator": OTHER_RESULT,
    "PythonLuck": "Python's random",
    "PythonShuffle": "Python's random",
    "SeedsItself": "other random numbers",
    "TorchGenerator": "SymIntArrayRef",
    # state
    "CountsCalls": "writes calls to the module",
    "TableThatGrows": "must match the size",
    "CountsInBuffer": "writes steps to the module",
    "CountsInDict": OTHER_RESULT,
    "CountsOnChild": "writes child.calls to the module",
    "ReplacesBuffer": "writes last to the module",
    "TableByShape": "unhashable type",
    "BackwardHookIsAdded": "a hook on first",
    "HookIsAdded": "a hook on first",
    "NumpyAttributeChanges": "an object of type ndarray",
    "TensorListAttributeChanges": OUTSIDE,
    # weights
    "CalledAndRead": "with other adapters",
    # the world
    "CachedConstant": OUTSIDE,
    "CachedHelper": "unhashable type",
    "CountsInGlobal": OTHER_RESULT,
    "GlobalHookIsAdded": "a global module hook",
    "GlobalTensorChanges": OUTSIDE,
    "MutableDefault": OTHER_RESULT,
    # structures
    "GeneratorArgument": "cannot pickle 'generator' object",
    "AppendsToArgument": "other values in an argument",
    "WritesDictArgument": "other values in an argument",
    "DataclassResult": "returns an object of type Batch",
    "ReturnsSelf": "returns an object of type ReturnsSelf",
    "ReturnsNumbers": "torch.Size",
    "EnumArgument": "argument colour is of type Colour",
    "FlagArgument": "argument layers is of type Layers",
    "FunctionArgument": "argument finish is of type builtin_function_or_method",
    "NamedTupleArgument": "argument pair is of type Pair",
}

SHARED_OUTCOMES: dict[str, str] = {
    "LayerDrop": VALUE,
    "PythonCoin": "Python's random",
    "PythonCounter": "writes calls to the module",
}
