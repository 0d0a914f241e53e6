"""What has gates stays what it is, and what is known of its calls holds until dispatch forgets it."""

import inspect
import os
import pickle
import sys
import threading

import pytest
import torch
from gate_samples import CALLS, FUNCTIONS, PLAIN, heads, numbers, rows
from torch.nn.functional import scaled_dot_product_attention

import tilebook
from tilebook import dispatch, left
from tilebook.left import Left
from tilebook.native import gates

every_call = pytest.mark.parametrize("name", CALLS)


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


# The functions stay what they are


def test_arguments_may_be_given_in_any_way(gated):
    x, residual, weight, bias = rows(2, 2)
    expected = PLAIN["added layer norm"](x, residual, weight, bias)
    gated.known(tilebook.add_layer_norm, x, residual, weight, bias)
    for args, options in (
        ((x, residual), {"bias": bias, "weight": weight}),
        ((), {"residual": residual, "x": x, "bias": bias, "weight": weight, "eps": 1e-5}),
        ((x, residual, weight, bias, 1e-5), {}),
    ):
        hit, found = gated.answered(tilebook.add_layer_norm, *args, **options)
        assert hit
        same(found, expected)


def test_what_is_no_call_is_refused_as_ever(gated):
    x, weight = rows(1)
    gated.known(tilebook.rms_norm, x, weight)
    for args, options in (
        ((), {}),
        ((x, weight, 1e-6, 2), {}),
        ((x,), {"x": x}),
        ((x,), {"other": x}),
        ((x,), {"weight": weight, "eps": None}),
    ):
        with pytest.raises(TypeError):
            gated(tilebook.rms_norm, *args, **options)
    with pytest.raises(ValueError, match="tensor"):
        gated(tilebook.rms_norm, "x")


def test_errors_are_pytorchs(gated):
    logits, labels = CALLS["loss"][1]()
    gated.known(tilebook.cross_entropy, logits, labels)
    wrong = labels + 100
    with pytest.raises(Exception, match="out of bounds") as theirs:
        PLAIN["loss"](logits, wrong)
    with pytest.raises(theirs.type, match="out of bounds") as ours:
        gated(tilebook.cross_entropy, logits, wrong)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_name_signature_and_text_are_those_of_the_function(gated, function):
    assert pickle.loads(pickle.dumps(function)) is function
    assert inspect.isfunction(function)
    assert function.__doc__
    assert next(iter(inspect.signature(function).parameters)) in ("q", "query", "x", "input", "gate")


def test_a_compiled_program_is_traced_through_it(gated):
    x, weight = rows(1)
    gated.known(tilebook.rms_norm, x, weight)
    graphs = []

    def seen(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x, w: tilebook.rms_norm(x * 2, w) + 1, backend=seen, fullgraph=True)
    same(compiled(x, weight), PLAIN["rms norm"](x * 2, weight) + 1)
    assert any("rms_norm" in str(node.target) for node in graphs[0].graph.nodes)
    torch._dynamo.reset()


def test_a_function_that_was_changed_is_called(gated):
    x, weight = rows(1)
    gated.known(tilebook.rms_norm, x, weight)
    code, defaults = tilebook.rms_norm.__code__, tilebook.rms_norm.__defaults__
    try:
        tilebook.rms_norm.__defaults__ = None, 1.0
        hit, found = gated.answered(tilebook.rms_norm, x, weight)
        assert not hit
        same(found, torch.rms_norm(x, (8,), weight, 1.0))
        tilebook.rms_norm.__defaults__ = defaults
        tilebook.rms_norm.__code__ = (lambda x, weight=None, eps=1e-6: "changed").__code__.replace(co_freevars=())
        assert gated.answered(tilebook.rms_norm, x, weight) == (False, "changed")
    finally:
        tilebook.rms_norm.__code__, tilebook.rms_norm.__defaults__ = code, defaults
    assert gated.answered(tilebook.rms_norm, x, weight)[0]


def test_defaults_that_were_changed_where_they_are_hold(gated):
    given, defaults = heads(), tilebook.attention.__kwdefaults__
    before = dict(defaults)
    gated.known(tilebook.attention, *given)
    try:
        defaults["causal"] = True
        hit, found = gated.answered(tilebook.attention, *given)
        assert not hit
        same(found, scaled_dot_product_attention(*given, is_causal=True))
        defaults["causal"] = False
        assert gated.answered(tilebook.attention, *given)[0]
        del defaults["causal"]
        with pytest.raises(TypeError, match="causal"):
            gated(tilebook.attention, *given)
    finally:
        defaults.clear()
        defaults.update(before)
    assert gated.answered(tilebook.attention, *given)[0]


def test_only_a_function_of_the_forms_arguments_gets_a_gate(gated):
    def rms_norm(x, eps=1e-6, weight=None):
        return x

    def several(x, weight=None, *eps):
        return x

    for function, form in ((rms_norm, "rms_norm"), (several, "rms_norm"), (rms_norm, "nothing")):
        with pytest.raises(ValueError, match="no gate"):
            gated.extension.gate(function, form)
    with pytest.raises(TypeError):
        gated.extension.gate(len, "rms_norm")


@pytest.mark.skipif(not gates.SUPPORTED, reason="the interpreter's own calls pass it by")
def test_calls_of_the_interpreter_are_answered(gated):
    x, weight = rows(1)
    gated.known(tilebook.rms_norm, x, weight)
    for _ in range(100):
        tilebook.rms_norm(x, weight)
        tilebook.rms_norm(x, weight=weight)
    assert sum(calls for _, calls in gated.extension.gates_counted()) == 200


# What is known, and until when


def test_calls_count_for_their_choices(gated):
    args = rows(1)
    for _ in range(7):
        gated(tilebook.rms_norm, *args)
    gated.here._tell("counted")
    assert [each.calls for each in gated.here._memo.values()] == [7]


@pytest.mark.parametrize("event", ["reload", "look_again", "use", "close"])
def test_what_dispatch_forgets_is_looked_at_at_once(gated, event):
    args = rows(1)
    gated.known(tilebook.rms_norm, *args)
    gated(tilebook.rms_norm, *args)
    (choice,) = gated.here._memo.values()
    if event == "use":
        with gated.here.use("torch"):
            assert not gated.answered(tilebook.rms_norm, *args)[0]
    elif event == "close":
        gated.gates.close()
    else:
        getattr(gated.here, event)()
    assert choice.calls == 4, "calls until then are counted"
    assert not gated.answered(tilebook.rms_norm, *args)[0]
    gated.known(tilebook.rms_norm, *args)
    assert gated.answered(tilebook.rms_norm, *args)[0] == (event != "close")


def test_a_verdict_that_has_ours_ahead_from_now_on_serves_at_once(gated, monkeypatch):
    args = rows(1)
    gated.known(tilebook.rms_norm, *args)
    chosen = []

    def choose(op, problem, device):
        chosen.append(op.name)
        return type(gated.here).choose(gated.here, op, problem, device)

    monkeypatch.setattr(gated.here, "choose", choose)
    gated(tilebook.rms_norm, *args)
    assert not chosen
    gated.here.reload()
    gated(tilebook.rms_norm, *args)
    assert chosen == ["rms_norm_fwd"]


def test_what_was_forgotten_while_it_was_asked_is_not_kept(gated, monkeypatch):
    args = rows(1)
    settle = left._gated.settle

    def forgets(*given):
        gated.here._tell("changed")
        settle(*given)

    monkeypatch.setattr(left._gated, "settle", forgets)
    assert not any(gated.answered(tilebook.rms_norm, *args)[0] for _ in range(4))


def test_only_the_call_under_way_is_settled(gated):
    x, weight = rows(1)
    settle = gated.extension.settle
    settle(True, False, None, (x, weight))  # outside of any call
    assert not gated.answered(tilebook.rms_norm, x, weight)[0]
    other = Left(True, True, False)

    class Tells(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            left._allows(other, False, (x, weight))
            return x

    gated(tilebook.rms_norm, torch.zeros(3, 8).as_subclass(Tells))
    assert gated.extension.gates_counted() == []
    assert not gated.answered(tilebook.rms_norm, x, weight)[0]


@pytest.mark.parametrize(
    "change", [lambda x, w: (w, x), lambda x, w: (x,), lambda x, w: (x, w, w), lambda x, w: (x.clone(), w)]
)
def test_what_is_said_of_other_tensors_is_not_of_this_call(gated, monkeypatch, change):
    args = rows(1)
    settle = left._gated.settle
    monkeypatch.setattr(left._gated, "settle", lambda *told: settle(*told[:3], change(*told[3])))
    assert all(gated.looked_at(tilebook.rms_norm, *args) for _ in range(4))


def test_every_call_is_looked_at_while_it_is_told_so(gated):
    args = rows(1)
    gated.known(tilebook.rms_norm, *args)
    gated.extension.gates_ask(True)
    assert gated.looked_at(tilebook.rms_norm, *args)
    gated.extension.gates_ask(False)
    assert gated.answered(tilebook.rms_norm, *args)[0]


class Turns:
    """In a `Pace`'s place."""

    def __init__(self):
        self.theirs, self.asked = True, 0

    def host_bound(self):
        self.asked += 1
        if isinstance(self.theirs, Exception):
            raise self.theirs
        return self.theirs


def test_where_steps_take_turns_each_call_asks_whose_it_is(gated, monkeypatch):
    x, weight = rows(1)
    turns = Turns()
    gated(tilebook.rms_norm, x, weight)
    (key,) = gated.here.left
    gated.here.left[key] = gated.here.left[key]._replace(forward=turns)
    gated.known(tilebook.rms_norm, x, weight)
    before = turns.asked
    assert gated.answered(tilebook.rms_norm, x, weight)[0]
    assert turns.asked == before + 1
    turns.theirs = False
    assert not gated.answered(tilebook.rms_norm, x, weight)[0]
    turns.theirs = KeyError("broken")
    with pytest.raises(KeyError, match="broken"):
        gated(tilebook.rms_norm, x, weight)
    turns.theirs = True
    assert gated.answered(tilebook.rms_norm, x, weight)[0]


def test_what_is_ours_to_serve_with_gradients_is_pythons(gated):
    x, weight = rows(1)
    gated(tilebook.rms_norm, x, weight)
    (key,) = gated.here.left
    gated.here.left[key] = gated.here.left[key]._replace(training=False)
    learnt = weight.requires_grad_()
    gated.known(tilebook.rms_norm, x, learnt)
    assert not gated.answered(tilebook.rms_norm, x, learnt)[0]
    gated.known(tilebook.rms_norm, x, weight.detach())
    assert gated.answered(tilebook.rms_norm, x, weight.detach())[0]


def test_choices_are_let_go_when_all_is_forgotten(gated):
    args = rows(1)
    gated.known(tilebook.rms_norm, *args)
    (choice,) = gated.here._memo.values()
    before = sys.getrefcount(choice)
    gated.extension.forget()
    assert sys.getrefcount(choice) == before - 1


def test_memory_of_kinds_is_bounded_and_tensors_are_not_kept(gated):
    x, weight = rows(1)
    for _ in range(5):
        gated(tilebook.rms_norm, x, weight)
    before = sys.getrefcount(x), sys.getrefcount(weight)
    for _ in range(50):
        gated(tilebook.rms_norm, x, weight)
    assert (sys.getrefcount(x), sys.getrefcount(weight)) == before


@pytest.mark.parametrize("how", ["TILEBOOK_DISABLE", "disable"])
def test_turning_tilebook_off_is_followed(gated, how, monkeypatch):
    args = rows(1)
    if how == "disable":  # PyTorch's functions are themselves again, ours stay
        tilebook.enable()
        tilebook.disable()
        gated.known(tilebook.rms_norm, *args)
        assert gated.answered(tilebook.rms_norm, *args)[0]
    else:
        monkeypatch.setattr("tilebook.call._DISABLED", True)
        gated.known(tilebook.rms_norm, *args)
        hit, found = gated.answered(tilebook.rms_norm, *args)
        assert not hit
        same(found, PLAIN["rms norm"](*args))
        assert not gated.here._memo


def test_threads_call_while_all_is_forgotten(gated):
    sizes, wrong, going = range(2, 10), [], threading.Event()
    args = {n: (numbers(n, 8), numbers(8)) for n in sizes}
    expected = {n: PLAIN["rms norm"](*each) for n, each in args.items()}

    def work():
        while not going.is_set():
            for n, each in args.items():
                if not torch.equal(gated(tilebook.rms_norm, *each), expected[n]):
                    wrong.append(n)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for _ in range(200):
        gated.here.look_again()
        gated.here.misses()
    going.set()
    for each in threads:
        each.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_goes_on(gated):
    args = rows(1)
    expected = PLAIN["rms norm"](*args)
    gated.known(tilebook.rms_norm, *args)
    child = os.fork()
    if not child:
        right = torch.equal(gated(tilebook.rms_norm, *args), expected)
        gated.here.reload()
        right &= torch.equal(gated(tilebook.rms_norm, *args), expected)
        os._exit(not right)
    assert os.waitpid(child, 0)[1] == 0


def test_a_function_loaded_later_gets_its_gate(gated, monkeypatch):
    monkeypatch.setattr(gates, "put", gated.gates.put)

    @left.gated("rms_norm")
    def late(x, weight=None, eps=1e-6):
        return tilebook.rms_norm(x, weight, eps)

    assert left._gated.functions[-1] == (late, "rms_norm")
    x, weight = rows(1)
    for _ in range(3):
        gated(late, x, weight)
    assert gated.answered(late, x, weight)[0]


def test_without_the_extension_it_is_built_and_functions_are_called(monkeypatch):
    begun = []
    monkeypatch.setattr("tilebook.native.begin", lambda: begun.append(True))
    monkeypatch.setattr("tilebook.native._serving", type("None_", (), {"extension": lambda self: None})())
    assert gates.Gates(dispatch.Dispatch()).open([(tilebook.rms_norm, "rms_norm")]) is None
    assert begun == [True]
    monkeypatch.setattr(gates, "SUPPORTED", False)
    assert gates.open_for([]) is None
    assert begun == [True]
