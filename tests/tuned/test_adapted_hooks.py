"""Hooks on modules inside the blocks of adapted real models fire as often, and see the same, as without graphs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.support.peers import (
    BERT,
    DIT,
    LARGE,
    LLAMA,
    QUICK,
    VIT,
    Peer,
    adapted,
    assert_close,
    counts,
    each,
    pair,
    tensors,
)

# the inputs of the first block are frozen
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def with_hooks(peer: Peer, model: nn.Module, paths: list[str]) -> list[tuple[str, str, list[Tensor]]]:
    """Return what hooks of all kinds on these modules see in one forward and backward."""
    seen: list[tuple[str, str, list[Tensor]]] = []

    def note(path: str, kind: str):
        def hook(module: nn.Module, *values: object) -> None:
            seen.append((path, kind, [tensor.detach().clone() for tensor in tensors(values)]))

        return hook

    handles = []
    for path in paths:
        module = model.get_submodule(path)
        handles += [
            module.register_forward_pre_hook(note(path, "before")),
            module.register_forward_hook(note(path, "after")),
            module.register_full_backward_hook(note(path, "backward")),
        ]
    peer.call(model).float().square().mean().backward()
    for handle in handles:
        handle.remove()
    return seen


@each(QUICK, slow=LARGE)
def test_hooks_on_inner_modules_fire_as_often_and_see_the_same_as_in_the_module_backend(peer: Peer):
    graph, modules = pair(peer)
    inner = f"{peer.block}.{peer.inner}"
    linear = next(path for path, m in graph.named_modules() if path.startswith(inner) and isinstance(m, nn.Linear))
    for paths in ([inner], [linear], [peer.block, inner, linear]):
        ours, theirs = with_hooks(peer, graph, paths), with_hooks(peer, modules, paths)
        assert len(theirs) == 3 * len(paths)
        assert [entry[:2] for entry in ours] == [entry[:2] for entry in theirs]
        assert_close([entry[2] for entry in ours], [entry[2] for entry in theirs])
    before = counts(graph)
    peer.call(graph)
    assert counts(graph)[1] == before[1], "without hooks the graphs run again"


@each((BERT, DIT), slow=(LLAMA, VIT, *LARGE))
def test_hooks_on_adapter_modules_fire_as_in_the_module_backend(peer: Peer):
    graph, modules = pair(peer, dropout=0.1)
    linear = next(path.removesuffix(".lora_A") for path, _ in graph.named_modules() if path.endswith(".lora_A"))
    for name in ("lora_A", "lora_B", "lora_dropout"):
        results = []
        for model in (graph, modules):
            torch.manual_seed(7)
            results.append(with_hooks(peer, model.train(), [f"{linear}.{name}.default"]))
        assert {"before", "after"} <= {kind for _, kind, _ in results[1]}
        assert [entry[:2] for entry in results[0]] == [entry[:2] for entry in results[1]]
        assert_close(*([entry[2] for entry in seen] for seen in results))


@each(QUICK, slow=LARGE)
def test_hook_that_changes_a_result_changes_the_output_as_in_the_module_backend(peer: Peer):
    graph, modules = pair(peer)
    path = f"{peer.block}.{peer.inner}"
    linear = next(name for name, m in graph.named_modules() if name.startswith(path) and isinstance(m, nn.Linear))
    plain = peer.call(graph)
    for model in (graph, modules):
        model.get_submodule(linear).register_forward_hook(lambda module, args, out: 3 * out)
    assert_close(peer.call(graph), peer.call(modules))
    assert not torch.allclose(peer.call(graph), plain, atol=1e-4)


def test_hook_check_sees_hooks_that_do_not_fire():
    tuned = adapted(BERT)
    path = "bert.encoder.layer.0.intermediate"
    assert len(with_hooks(BERT, tuned, [path])) == 3
    tuned.get_submodule("bert.encoder.layer.0").forward = lambda hidden, *args, **kwargs: hidden
    assert with_hooks(BERT, tuned, [path]) == []
