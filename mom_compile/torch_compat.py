"""Every private PyTorch API this project leans on, and what each stands for.

A new PyTorch release should cost this one file. Checked with torch 2.11 to 2.14.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo import config as dynamo_config
from torch._dynamo import convert_frame
from torch._dynamo.convert_frame import compile_lock, input_codes
from torch._dynamo.decorators import maybe_mark_dynamic
from torch._dynamo.eval_frame import OptimizedModule, cached_backends, reset_code
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.pgo import get_code_state
from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX
from torch._dynamo.source import ConstantSource
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd import runtime_wrappers
from torch._functorch._aot_autograd.aot_autograd_result import CompiledForward
from torch._functorch._aot_autograd.autograd_cache import BypassAOTAutogradCache
from torch._guards import CompileContext, TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options, list_options
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.loop_body import LoopBody
from torch._inductor.lowering import fallbacks, lowerings
from torch._inductor.output_code import CompiledFxGraph, OutputCode
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._inductor.utils import BoxedBool
from torch._inductor.virtualized import V
from torch._ops import OpOverload as OpOverload
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeCopyMode as FakeCopyMode
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.compiler import config as compiler_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, guard_or_false
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_any as tree_any
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._sympy.value_ranges import ValueRanges

from mom_passes.graph.meta import meta_value
from mom_passes.ops.convolution import DECOMPOSITIONS
from mom_passes.torch_compat import is_wrapper

#: `(gm, example_inputs, **kwargs) -> callable taking a list of inputs`, as Inductor calls it.
InnerCompile = Callable[..., Any]


class UserError(ValueError, ShortenTraceback):
    """A `ValueError` that reaches the user as it is: his own frames, the one that raised it, and the message alone.

    Dynamo wraps what a backend raises in `BackendCompilerFailed`, except `ShortenTraceback`, of which it drops all its
    own frames up to the first useful one. To the arguments of either it adds advice on reporting bugs.
    """

    def __init__(self, message: str) -> None:
        raised_in = inspect.currentframe()
        ShortenTraceback.__init__(self, message, first_useful_frame=raised_in.f_back if raised_in else None)
        self.message = message

    def __str__(self) -> str:
        return self.message


#: The lock that Dynamo holds while it compiles, and AOTAutograd while it compiles a backward graph at run time. It is
#: reentrant. Whatever compiles outside of Dynamo takes this one and no lock of its own: Inductor is not made for two
#: threads, and with a single lock there is no order in which two could be taken.
COMPILING = compile_lock

#: What a fake tensor raises where only data could tell.
NEEDS_DATA = (DataDependentOutputException, DynamicOutputShapeException)


def compiled_from(model: Any) -> Any:
    """The module or function from which `torch.compile` made `model`; None if it did not make it.

    `_orig_mod` and `_torchdynamo_orig_callable` are where `torch.compile` keeps them.
    """
    if isinstance(model, OptimizedModule):
        return model._orig_mod
    return getattr(model, "_torchdynamo_orig_callable", None) if inspect.isfunction(model) else None


class _Seen(ShortenTraceback):
    """Ends a call once its graph is known: what a backend raises passes through Dynamo, which then keeps nothing."""


def trace_whole(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], backend: Callable[..., Any]
) -> str | None:
    """Trace a call as one graph, hand that to `backend` and give the call up: nothing of it runs, and no side effect of
    it happens. Gives None, or the first line of why it cannot be one graph; then `backend` may not have been called.
    """

    def stopping(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        backend(gm, example_inputs)
        raise _Seen("the graph is known", first_useful_frame=None)

    # Dynamo keeps by code object how often and with which sizes it has met it: this one is nobody else's.
    code = _call.__code__.replace(co_name="explained")
    own = types.FunctionType(code, _call.__globals__, "explained")
    try:
        torch.compile(own, backend=stopping, fullgraph=True)(function, args, kwargs)
    except _Seen:
        return None
    except Exception as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    return None


def _call(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return function(*args, **kwargs)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """What Dynamo learns meanwhile it forgets, and nothing else: graphs of code that it had not met before, sizes that
    it would have taken for dynamic next time, and the backends of these."""
    codes, sizes, backends = set(input_codes.seen_ids), copy.deepcopy(dict(get_code_state())), set(cached_backends)
    try:
        yield
    finally:
        for known in list(input_codes.seen):
            code = known()
            if code is not None and id(code) not in codes:
                reset_code(code)
        state = get_code_state()
        state.clear()
        state.update(sizes)
        for key in cached_backends.keys() - backends:
            del cached_backends[key]


def needs_gradients(example_inputs: Sequence[Any]) -> bool:
    """Whether AOTAutograd makes a backward graph, too."""
    tensors = (value for value in example_inputs if isinstance(value, torch.Tensor))
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def any_autocast() -> bool:
    """Whether operators choose their dtypes on some device."""
    return bool(torch._C._is_any_autocast_enabled())


def trace(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    inner_compile: InnerCompile,
    patches: dict[str, Any],
    cache_tag: str | None = None,
) -> Callable[..., Any]:
    """Inductor's front half: AOTAutograd, decompositions and joint-graph passes, then `inner_compile`.

    With a `cache_tag`, `inner_compile` returns a `Storable`, which AOTAutogradCache keeps and hands out in place of all
    that: for the same graph, settings, guards and tag. It keys on the graph and not on `inner_compile`: without a tag
    it would hand us stock Inductor's artifact, and stock Inductor ours, so that it is off then.

    Inductor's freezing is off: it makes constants of a graph's weights, so that its copies of them are in memory beside
    the model's, and it hands over graphs whose weights have no values.
    """
    with contextlib.ExitStack() as stack:
        if cache_tag is None or not _cacheable(gm, example_inputs):
            stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        else:
            stack.enter_context(_storing(cache_tag))
            inner_compile = functools.partial(_for_pieces, inner_compile)
        compiled: Any = compile_fx(
            gm,
            example_inputs,
            inner_compile=functools.partial(_with_inductors_decompositions, inner_compile),
            config_patches={**patches, "freezing": False},
            decompositions=_decompositions(),
        )
        return compiled


_CAT = torch.ops.aten.cat.default


def _with_inductors_decompositions(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A table of another's cannot be in a key of the FX graph cache."""
    if "get_decomp_fn" in kwargs:
        kwargs["get_decomp_fn"] = select_decomp_table
    return function(*args, **kwargs)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    table = {**select_decomp_table()}
    table[_CAT] = functools.partial(_cat, table[_CAT])
    return table


def _cat(of_inductor: Callable[..., Any], tensors: Sequence[torch.Tensor], dim: int = 0) -> Any:
    """Inductor's decomposition, with the layout that eager mode gives the result where one operand alone has elements.

    The keys of a prompt are concatenated with an empty cache. Inductor returns them as they lie, the heads of one token
    side by side; a decode step returns them token behind token for each head, as eager mode does in either case. Dynamo
    would capture a graph for the first step of a prompt and another for those behind it.
    """
    filled = [tensor for tensor in tensors if not _has_nothing(tensor, dim)]
    if len(filled) != 1 or len(tensors) == 1:
        return of_inductor(tensors, dim)
    formats = {suggest_memory_format(tensor) for tensor in tensors}
    alone = filled[0] if len({tensor.dtype for tensor in tensors}) == 1 else of_inductor(tensors, dim)
    return alone.clone(memory_format=formats.pop() if len(formats) == 1 else torch.contiguous_format)


def _has_nothing(tensor: torch.Tensor, dim: int) -> bool:
    """Without a guard on its size, as Inductor asks."""
    legacy = tensor.dim() == 1 and guard_or_false(tensor.shape[0] == 0)
    return legacy or (dim < tensor.dim() and guard_or_false(tensor.shape[dim] == 0))


def is_only_decomposed(target: Any) -> bool:
    """Whether Inductor decomposes an operator and does not lower it. It refuses a graph that calls one."""
    if not isinstance(target, OpOverload) or target in lowerings:
        return False
    return target in select_decomp_table() or target in DECOMPOSITIONS


def decomposition(call: Callable[..., Any], values: Sequence[Any], mode: FakeTensorMode) -> fx.GraphModule:
    """A function of fake values of `mode`, as a graph of operators that Inductor decomposes no further."""
    with mode, enable_python_dispatcher(), torch.no_grad():
        return make_fx(call, {**select_decomp_table(), **DECOMPOSITIONS}, tracing_mode="real")(*values)  # type: ignore[no-any-return]


#: What the user has in the keys of PyTorch's compile caches.
_users_tag: contextvars.ContextVar[str] = contextvars.ContextVar("_users_tag", default="")


@contextlib.contextmanager
def _storing(cache_tag: str) -> Iterator[None]:
    """An entry holds what `inner_compile` returned, not the key of an FX graph, and has `cache_tag` in its key."""
    users = compiler_config.cache_key_tag
    before = _users_tag.set(users)
    try:
        with _tagged(f"{users} {cache_tag}"), functorch_config.patch(bundled_autograd_cache=True):
            yield
    finally:
        _users_tag.reset(before)


def _tagged(tag: str) -> contextlib.AbstractContextManager[None]:
    patch: Any = compiler_config.patch  # type: ignore[attr-defined]
    return patch(cache_key_tag=tag)  # type: ignore[no-any-return]


def _for_pieces(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Pieces are shared by all tags, and are in the FX graph cache, which bundling would leave out."""
    with _tagged(_users_tag.get()), functorch_config.patch(bundled_autograd_cache=False):
        return function(*args, **kwargs)


def _cacheable(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> bool:
    """Graphs without gradients, and without tensors of their own: of these only the metadata would be in the key."""
    if needs_gradients(example_inputs):
        return False
    own: list[Any] = [*gm.parameters(), *gm.buffers()]
    own += [vars(gm).get(str(n.target).split(".")[0]) for n in gm.graph.nodes if n.op == "get_attr"]
    return not any(isinstance(value, torch.Tensor) for value in own)


class NotStorable(BypassAOTAutogradCache):
    """AOTAutogradCache leaves a graph out, and says so in its log. Loading, it compiles the graph anew."""


class Storable(OutputCode):
    """What AOTAutogradCache keeps: compiled code that AOTAutograd calls with one list, which it may empty.

    A subclass implements `__call__(inputs)`, `stored() -> bytes` and `load(data, example_inputs, settings)`. `stored`
    and `load` raise `NotStorable` where that cannot be done.
    """

    data: bytes | None = None

    def __init__(self) -> None:
        # AOTAutograd's wrappers copy what an object has, not what its class has.
        self._boxed_call = True

    def stored(self) -> bytes:
        raise NotImplementedError

    def load(self, data: bytes, example_inputs: Sequence[Any], settings: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def prepare_for_serialization(self) -> None:
        """Called on a copy, which is pickled."""
        data = self.stored()
        self.__dict__.clear()
        self.data = data

    def post_compile(self, example_inputs: Sequence[Any], constants: Any, graph_kwargs: Any) -> None:
        """Called on what was unpickled."""
        data, self.data = self.data, None
        assert data is not None
        self._boxed_call = True
        _for_pieces(self.load, data, example_inputs, graph_kwargs)

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """Kernels are in the entries of the pieces."""


def stored_stock(compiled: Any) -> Any:
    """What stands for stock Inductor's code, to be pickled: its key in the FX graph cache. Raises `NotStorable`."""
    key = getattr(compiled, "_fx_graph_cache_key", None)
    if not isinstance(compiled, CompiledFxGraph) or key is None:
        raise NotStorable("what stock Inductor made is in no cache")
    return CompiledForward((key, list(compiled._fx_graph_cache_debug_lines or ())), compiled.guards_expr)


def loaded_stock(stored: Any, example_inputs: Sequence[Any], settings: Any) -> Any:
    """Stock Inductor's code by its key. Raises where the cache has lost it: AOTAutogradCache then compiles anew."""
    return stored.post_compile(stored.load(example_inputs), settings)


#: Marks dimensions of what a graph returns: `(tensor, dimensions)`. The second is its name in 2.11.
_mark_dynamic: Any = getattr(runtime_wrappers, "mark_dynamo_propagated_dynamic_indices", None) or getattr(
    runtime_wrappers, "maybe_mark_dynamic_helper", None
)


def sizes_become_dynamic() -> bool:
    """Whether Dynamo, which is compiling, takes a size for dynamic once it has seen two: not with `dynamic=False`."""
    return bool(dynamo_config.automatic_dynamic_shapes)


def expect_other_sizes(tensor: Any, dim: int) -> None:
    """The first graph that Dynamo captures with this tensor as an input is for any size of a dimension.

    AOTAutograd says so of symbolic sizes of what a graph returns. No guard looks at it: `maybe_mark_dynamic`, which is
    public, is guarded on since PyTorch 2.13.
    """
    if _mark_dynamic is None:
        return
    _mark_dynamic(tensor, {dim})
    if is_wrapper(tensor):
        names, _ = tensor.__tensor_flatten__()
        for inner in (getattr(tensor, name) for name in names):
            if inner.dim() == tensor.dim():
                _mark_dynamic(inner, {dim})


def floats_are_constants() -> contextlib.AbstractContextManager[None]:
    """While a function is compiled for all sizes, its floats stay what they are.

    Else Dynamo makes inputs of them, too, a norm's epsilon among them, finds in AOTAutograd that it need not have, and
    traces everything once more.
    """
    return dynamo_config.patch(specialize_float=True)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class GraphCount:
    """Which graph of one code object Dynamo compiles, and how many it will.

    code      numbers the code object, and the `isolate_recompiles` region that it is compiled in
    number    of this graph, from 1
    most      graphs that Dynamo makes of this code; afterwards a call that needs another one runs in eager mode
    limit     the setting of `torch._dynamo.config` that says so
    """

    code: tuple[int, int]
    number: int
    most: int
    limit: str


_graph_count: contextvars.ContextVar[GraphCount | None] = contextvars.ContextVar("_graph_count", default=None)
#: Functions that are called with the code for which Dynamo makes no more graphs.
_when_exceeded: list[Callable[[GraphCount], None]] = []
_region_of_frame: Callable[[], int] = getattr(
    torch._C._dynamo.eval_frame, "get_eval_frame_isolate_recompiles_id", lambda: -1
)
_exceeds_recompile_limit = convert_frame.exceeds_recompile_limit


def _counting(cache_size: Any, compile_id: Any) -> tuple[bool, str]:
    """Dynamo calls this before each graph. If there are too many graphs, the call runs in eager mode."""
    exceeded, limit = _exceeds_recompile_limit(cache_size, compile_id)
    before = cache_size.num_cache_entries_with_same_id_matched_objs
    in_all = getattr(cache_size, "total_cache_entries_all_regions", cache_size.num_cache_entries)
    own = (int(dynamo_config.recompile_limit), "recompile_limit")
    shared = (int(dynamo_config.accumulated_recompile_limit) - in_all + before, "accumulated_recompile_limit")
    most, name = min(own, shared)
    count = GraphCount((compile_id.frame_id, _region_of_frame()), before + 1, most, limit if exceeded else name)
    _graph_count.set(count)
    if exceeded:
        for call in _when_exceeded:
            call(count)
    return exceeded, limit


convert_frame.exceeds_recompile_limit = _counting


def graph_count() -> GraphCount | None:
    """The count for the graph that this thread compiles under Dynamo; None if it compiles no graph."""
    count, compiling = _graph_count.get(), CompileContext.current_compile_id()
    known = count is not None and compiling is not None and compiling.frame_id == count.code[0]
    return count if known else None


def when_limit_exceeded(call: Callable[[GraphCount], None]) -> None:
    """Call `call(count)` whenever Dynamo runs a call in eager mode because there are too many graphs."""
    _when_exceeded.append(call)


#: Whether `torch.compile` can count the graphs of a model apart from all others: PyTorch 2.13 and later.
CAN_ISOLATE = {"isolate_recompiles", "recompile_limit"} <= inspect.signature(torch.compile).parameters.keys()


def is_cut_apart(library: str) -> bool:
    """Whether a function of the module `library` is compiled by itself, since another one that calls it was cut.

    Ask while a backend runs: the frame that Dynamo compiles is on the stack then. What Dynamo makes of the code behind
    a graph break is a function of the same module, with a prefix before its name.
    """
    names: list[str] = []
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == library:
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    cut = [name.startswith(TORCH_DYNAMO_RESUME_IN_PREFIX) for name in names]
    return bool(cut) and not cut[0] and any(cut)


def compile_apart(
    model: Any, limit: int, before: Callable[[dict[str, Any], Sequence[Any]], None] | None, **settings: Any
) -> Any:
    """`torch.compile`, of a module in place, with a limit of its own on how many graphs are made of it.

    `before(kwargs, args)` is called with the arguments of each call and may change `kwargs`. Where PyTorch cannot count
    the graphs of one model alone (before 2.13), the limit holds while this one is called, for the graphs of all models
    that share its code.
    """
    apart: dict[str, Any] = {"isolate_recompiles": True, "recompile_limit": limit} if CAN_ISOLATE else {}
    if not isinstance(model, torch.nn.Module):
        compiled: Any = torch.compile(model, **{**settings, **apart})
        return _prepared(compiled, limit, before)
    model.compile(**settings, **apart)
    # What a module's `compile` has made of its `_call_impl`, and its `__call__` calls.
    compiled = model._compiled_call_impl
    model._compiled_call_impl = _prepared(compiled, limit, before)
    return model


def _prepared(compiled: Callable[..., Any], limit: int, before: Callable[..., None] | None) -> Callable[..., Any]:
    """A compiled function whose calls are prepared, unless they are part of another function's graph."""
    if CAN_ISOLATE and before is None:
        return compiled

    @functools.wraps(compiled)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return compiled(*args, **kwargs)
        if before is not None:
            before(kwargs, args)
        if CAN_ISOLATE:
            return compiled(*args, **kwargs)
        with dynamo_config.patch(recompile_limit=max(limit, dynamo_config.recompile_limit)):
            return compiled(*args, **kwargs)

    return run


def stock_inner_compile(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    """Inductor's back half, exactly as `backend="inductor"` would call it."""
    return compile_fx_inner(gm, example_inputs, **kwargs)


@dataclass(frozen=True)
class CodegenSettings:
    """What, beside a graph, decides which code Inductor makes of it: `key` says it all, `config` is Inductor's own."""

    key: str
    config: Mapping[str, Any]


#: Passes that a user hands to Inductor, by name: `save_config_portable` leaves them out.
_CUSTOM_PASSES = (
    "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass",
    "_pre_fusion_custom_pass",
    "_post_fusion_custom_pass",
    "_fuse_ddp_communication_passes",
)
#: Such passes that are in a key by their address: nothing else may get it.
_seen_passes: dict[int, Any] = {}


def codegen_settings() -> CodegenSettings:
    """Of this moment. What Inductor's FxGraphCache puts into its keys, but for the graph and the machine."""
    config: dict[str, Any] = inductor_config.save_config_portable(ignore_private_configs=False)
    passes = {name: getattr(inductor_config, name, None) for name in _CUSTOM_PASSES}
    _seen_passes.update({id(value): value for value in passes.values()})
    switches = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.mkldnn.enabled,
        # C++ code has the number of threads written into it.
        torch.get_num_threads(),
        torch.cuda.current_device() if torch.cuda.is_initialized() else None,
    )
    identities = {name: id(value) for name, value in passes.items() if value is not None}
    return CodegenSettings(repr((sorted(config.items()), identities, switches)), config)


@contextlib.contextmanager
def inductor_as_of(settings: CodegenSettings) -> Iterator[None]:
    """Inductor's configuration as it was then, for what is compiled later than the graph it belongs to."""
    now = inductor_config.save_config_portable(ignore_private_configs=False)
    with inductor_config.patch({name: value for name, value in settings.config.items() if now.get(name) != value}):
        yield


_read_expression = LoopBody.get_read_expr


def _read_expression_if_any(body: LoopBody, name: str) -> Any:
    """Where a kernel reads a buffer; None where it does not.

    Inductor's C++ backend asks this of every user of a buffer that might stay in a local array, and keeps it there if
    all of them read it in order. Among its users is what only has to run later: a write to an input that was read to
    make the buffer. Such a kernel reads nothing, and Inductor raises `KeyError`. A loop's body writes to its inputs
    where the residual stream lives once. With None the buffer gets storage, as it does for any other order.
    """
    try:
        return _read_expression(body, name)
    except KeyError:
        return None


LoopBody.get_read_expr = _read_expression_if_any  # type: ignore[method-assign]


#: Where the code that is being loaded leaves what it would wait for.
_waits: contextvars.ContextVar[list[Callable[[], None]] | None] = contextvars.ContextVar("_waits", default=None)
_wait_now = AsyncCompile.wait


def _wait(loading: AsyncCompile, scope: dict[str, Any]) -> None:
    waits = _waits.get()
    if waits is None:
        _wait_now(loading, scope)
    else:
        waits.append(functools.partial(_wait_now, loading, scope))


AsyncCompile.wait = _wait  # type: ignore[method-assign, assignment]


@contextlib.contextmanager
def kernels_later(devices: Collection[torch.device]) -> Iterator[list[Callable[[], None]]]:
    """Code that Inductor compiles within does not wait for its C++ compilers: the list then has what waits for them,
    to be called before the code is, each of which raises what the compiler had to say.

    A module that Inductor writes starts a compiler for each of its kernels, and waits for them with its last line but
    one, `async_compile.wait(globals())`. For the one graph of a model that costs nothing. Ours are many: the passes
    stand still while a compiler works on a piece, and compilers while passes work on the next. Here alone, and in this
    thread alone, that line takes a note. Not for GPUs: what Triton compiled is put into the cache as a graph ends.
    """
    waits: list[Callable[[], None]] = []
    on_cpu = all(device.type == "cpu" for device in devices) and inductor_config.cpu_backend == "cpp"
    token = _waits.set(waits if on_cpu else None)
    try:
        yield waits
    finally:
        _waits.reset(token)


_compiler_started = threading.Event()
#: A kernel like those that Inductor writes.
_FIRST_KERNEL = """#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* out) { at::vec::Vectorized<float>(0.0f).store(out); }
"""


def start_the_compiler() -> None:
    """Have the C++ compiler do, beside what the calling thread does, what Inductor would wait for at its first kernel.

    It finds out which vector instructions there are, with a program for each kind, and compiles the header that all
    kernels include; both are kept on the disk. Here both are done, once in a process, with a kernel of no use. What
    goes wrong goes wrong again where Inductor does it, and is said there.

    A process does not end before: half a header would be found by the next one.
    """
    if not _compiler_started.is_set():
        _compiler_started.set()
        threading.Thread(target=_compile_first_kernel, name="mom_compile: first kernel").start()


def _compile_first_kernel() -> None:
    with contextlib.suppress(Exception):
        CppPythonBindingsCodeCache.load_pybinding(["float*"], _FIRST_KERNEL)


def asks_for_freezing(patches: Mapping[str, Any]) -> bool:
    """Whether Inductor's options, its configuration or the environment ask for constants in place of weights."""
    return bool(patches.get("freezing", inductor_config.freezing))


def mark_boxed(fn: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Tell AOTAutograd that `fn` takes one list and may empty it, so that inputs can die early."""
    fn._boxed_call = True  # type: ignore[attr-defined]
    return fn


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor's options for a `torch.compile` mode. Raises RuntimeError for an unknown one."""
    return dict(list_mode_options(mode))


def cxx_compiler() -> str:
    """The C++ compiler that Inductor would take. Raises `RuntimeError` where it finds none."""
    return get_cpp_compiler()


def compile_cache_folder() -> str:
    """Where Inductor keeps what it compiles; it is made if it is not there. Raises `OSError`."""
    return cache_dir()


def inductor_option_names() -> set[str]:
    return set(list_options())


def is_called(target: Any) -> bool:
    """Whether Inductor has no code of its own for an operator: it calls the operator as it is."""
    return isinstance(target, OpOverload) and (target not in lowerings or target in fallbacks)


class SymbolicSizes:
    """A fresh set of size symbols, and fake tensors over them, for compiling one piece on its own.

    The user's graph has its own symbols; a piece gets new ones so that layers, sequence lengths
    and even graphs can share it, and so that what it assumes about them can be read off.
    """

    def __init__(self) -> None:
        self.env = ShapeEnv()
        # Symbols are called s800, s801, ... Else they are s0 to s99 by a hash of their names, and where Inductor writes
        # FlexAttention in C++ it replaces `ks2`, say, by another name as text: also in `ks24`.
        self.env.unique_ids.update(range(800))
        self.mode = FakeTensorMode(shape_env=self.env, allow_non_fake_inputs=True)
        self.symbols: dict[str, sympy.Symbol] = {}

    def size(self, name: str, hint: int, minimum: int) -> torch.SymInt:
        """A new symbol `name >= minimum` whose example value is `hint`."""
        source = ConstantSource(name)
        symbol = self.env.create_symbol(
            hint,
            source,
            dynamic_dim=DimDynamic.DYNAMIC,
            positive=True if minimum > 0 else None,
            do_not_specialize_zero_one=minimum < 2,
        )
        if minimum < 2:
            self.env.var_to_range[symbol] = ValueRanges(sympy.Integer(minimum), self.env.var_to_range[symbol].upper)
        self.symbols[name] = symbol
        made: Any = self.env.create_symintnode(symbol, hint=hint, source=source)
        return made

    def expression(self, value: sympy.Expr, hint: int) -> torch.SymInt | int:
        """The SymInt of an expression over this set's symbols."""
        if value.is_Integer:
            return int(value)
        return self.env.create_symintnode(value, hint=hint)

    def tensor(self, shape: Sequence[Any], stride: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Any:
        with self.mode:
            return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=device)

    def propagate(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
        """Give every node its fake value, and custom operators those of their operands."""
        FakeTensorProp(gm, mode=self.mode).propagate_dont_convert_inputs(*inputs)
        for node in gm.graph.nodes:
            if "eager_input_vals" in node.meta:
                # As captured they are in the symbols of the user's graph; Inductor takes strides from them.
                node.meta["eager_input_vals"] = fx.map_arg((node.args, node.kwargs), lambda arg: meta_value(arg))

    def assumptions(self) -> list[sympy.Basic]:
        """Conditions on the symbols that tracing or compiling has relied on so far (guards, specialisations)."""
        conditions = [guard.expr for guard in self.env.guards]
        conditions += [sympy.Eq(a, b) for a, b in self.env.replacements.items() if a in self.symbols.values()]
        return [c for c in conditions if c is not sympy.true]

    def compile(self, gm: fx.GraphModule, inputs: Sequence[Any], patches: dict[str, Any]) -> Callable[[list[Any]], Any]:
        """Inductor's back half on one piece, without CUDA graphs: its loops write to a new place each time.

        A buffer that is kept for a later one of its size is alive in between, where an attention has temporaries that
        Inductor knows nothing of. The allocator gives it back as fast.
        """
        with (
            tracing(TracingContext(self.mode)),
            V.set_fake_mode(self.mode),
            inductor_config.patch({"allow_buffer_reuse": False, **patches, "triton.cudagraphs": False}),
            torch.no_grad(),
        ):
            return _plain_after_a_first_call(compile_fx_inner(gm, inputs, is_inference=True))


def _plain_after_a_first_call(compiled: Any) -> Callable[[list[Any]], Any]:
    """A `CompiledFxGraph` whose first call is its own, which closes its record of tuned kernels, and which is called
    without that bookkeeping afterwards: it costs a decode step of many pieces more than they take from each other."""
    call: Callable[[list[Any]], Any] = compiled

    def run(inputs: list[Any]) -> Any:
        nonlocal call
        now, call = call, getattr(compiled, "current_callable", None) or compiled
        return now(inputs)

    run.compiled = compiled  # type: ignore[attr-defined]
    return run


def stored_piece(run: Any) -> Any:
    """What stands for a compiled piece, to be pickled: its key in the FX graph cache. Raises `NotStorable`."""
    return stored_stock(getattr(run, "compiled", None))


def loaded_piece(stored: Any) -> Callable[[list[Any]], Any]:
    """A compiled piece by its key, as `SymbolicSizes.compile` made it. Raises where the cache has lost it."""
    settings = {"cudagraphs": BoxedBool(False), "boxed_forward_device_index": None, "is_backward": False}
    # Not in the context of the graph that is being captured: it would take the piece's strides for its own.
    with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))), torch.no_grad():
        return _plain_after_a_first_call(loaded_stock(stored, (), settings))


def keep_output_strides(graph: fx.Graph) -> None:
    """Make Inductor return every output with the strides its fake value has, as it does for a user's outputs."""
    output = next(iter(reversed(graph.nodes)))
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))


def mark_stored(node: fx.Node) -> None:
    """Make Inductor store a node's value, which its readers would otherwise compute again, each for itself.

    The mark is Inductor's own (`fx_passes/decompose_mem_bound_mm.py`). It is no part of FxGraphCache's keys: what an
    earlier version has stored of a graph is as right, and slower.
    """
    node.meta["inductor_realize_to_strides"] = True


def least_value(size: torch.SymInt) -> int:
    """The least value a symbol can have (2 for the sizes that Dynamo makes dynamic)."""
    bounds = size.node.shape_env.var_to_range.get(size.node.expr)
    lower = bounds.lower if bounds is not None else 0
    return int(lower) if getattr(lower, "is_Integer", False) else 0


def bounds_of(size: torch.SymInt) -> tuple[int, int | None]:
    """The least and the most that a graph's guards let a symbol be; None: it has no most."""
    bounds = size.node.shape_env.var_to_range.get(size.node.expr)
    most: Any = getattr(bounds, "upper", None)
    return least_value(size), int(most) if getattr(most, "is_Integer", False) else None


def may_vary(value: torch.Tensor, dim: int) -> None:
    """A dimension of an input to be traced as a symbol, unless the traced code needs to know it."""
    maybe_mark_dynamic(value, dim)


_checks: Any = torch._C._dynamo.guards

#: `(tensor, shape, strides, offset)` to a view that begins `offset` values behind the tensor: Inductor's own; it asks
#: nothing and takes half the time of `narrow`.
view_of: Callable[[torch.Tensor, tuple[int, ...], tuple[int, ...], int], torch.Tensor] = _checks._reinterpret_tensor

#: `(tensor, shape, strides)`: raises `AssertionError` for a tensor that is laid out otherwise, as compiled code does.
#: The stride of a dimension of size one says nothing.
assert_layout: Callable[[torch.Tensor, tuple[int, ...], tuple[int, ...]], None] = _checks.assert_size_stride

#: Inductor options of code whose inputs somebody else has checked.
UNCHECKED: Mapping[str, Any] = {"size_asserts": False}

#: In a tensor subclass: Python functions of `torch` treat it as a tensor; only operators see the class.
no_torch_function = torch._C._disabled_torch_function_impl


def make_wrapper(
    cls: type[torch.Tensor], inner: torch.Tensor, device: torch.device, offset: int | torch.SymInt | None = None
) -> Any:
    """A tensor of a subclass with the sizes and strides of another and no bytes of its own.

    It has a storage whose address is null: like a fake tensor, it must not tell anybody. Where it begins in there is
    where the other does, or `offset`. Dynamo makes a fake of the inner tensor that begins at 0, and takes a wrapper
    that does not for one that has been changed by `set_`.
    """
    made = torch.Tensor._make_wrapper_subclass(
        cls,
        inner.shape,
        strides=inner.stride(),
        storage_offset=inner.storage_offset() if offset is None else offset,
        dtype=inner.dtype,
        layout=inner.layout,
        device=device,
        requires_grad=False,
    )
    torch._C._set_throw_on_mutable_data_ptr(made)
    return made


def being_traced() -> bool:
    """Whether a graph is being captured (Dynamo, AOTAutograd)."""
    return TracingContext.try_get() is not None


def assert_later(holds: torch.Tensor, message: str) -> None:
    """Have a device check a condition that it has computed, without waiting for it, as `item` would."""
    torch._assert_async(holds, message)


# --- who sees a storage ---


def _uses(value: torch.Tensor) -> int:
    """How many tensors see a tensor's storage, with a constant on top.

    `torch._C._storage_Use_Count` is the reference count of the C++ storage. CUDA graph trees of Inductor read it, too.
    """
    return torch._C._storage_Use_Count(value.untyped_storage()._cdata)


def _holders(value: torch.Tensor) -> int:
    """What holds a tensor: its Python object is one, and so is DLPack, a view, or a graph that saved it for a gradient.

    `Tensor._use_count` is the reference count of the C++ tensor.
    """
    return value._use_count()  # type: ignore[attr-defined]


def _references_to_base(view: torch.Tensor) -> int:
    """How many references there are to what a tensor is a view of (`_base`), with a constant on top."""
    return sys.getrefcount(view._base)


def _is_foreign(storage: torch.UntypedStorage) -> bool:
    """Whether the memory may be another's: of NumPy, a file, a process, or a part of another storage.

    On a GPU `is_shared` is always true.
    """
    return not storage.resizable() or (storage.device.type == "cpu" and storage.is_shared())


def _shares_storage_with_base(view: torch.Tensor) -> bool:
    """False behind an assignment to `view.data`."""
    base = view._base
    return base is not None and base.untyped_storage()._cdata == view.untyped_storage()._cdata


# Of tensors that nobody else sees. In inference mode a view has no base.
with torch.inference_mode(False):
    _ONE = torch.empty(2, device="cpu")
    _USES_OF_ONE, _HOLDERS_OF_ONE = _uses(_ONE), _holders(_ONE)
    _VIEW = torch.empty(2, device="cpu")[:1]
    _REFERENCES_OF_NOBODY, _HOLDERS_OF_BASE = _references_to_base(_VIEW), _holders(_VIEW._base)  # type: ignore[arg-type]


def is_alone(value: torch.Tensor) -> bool:
    """Whether nobody else sees the memory of `value`: no other tensor and nothing outside of PyTorch.

    A tensor that only `value` keeps alive does not count. Outside of inference mode a view keeps its base alive.
    """
    uses = _uses(value) - _USES_OF_ONE
    if _holders(value) > _HOLDERS_OF_ONE or _is_foreign(value.untyped_storage()):
        return False
    if uses != 1 or not value._is_view() or not _shares_storage_with_base(value):
        return uses == 0
    base_is_free = _references_to_base(value) == _REFERENCES_OF_NOBODY
    return base_is_free and _holders(value._base) == _HOLDERS_OF_BASE  # type: ignore[arg-type]
