"""Reads `policy.pt2` or `encoder.pt2`, archives of torch.export, and plays them. Nothing in a file is executed.

torch.export.load trusts its file: it unpickles `sample_inputs` and constants, evaluates size expressions and guards as
Python code, and looks operators up by any name below `torch`, torch.hub.load among them. A run folder may come from a
stranger, so the archive is read here: weights as raw numbers, the graph as JSON, and the graph is played one operator
after another, each from the list below. What is not known is refused. A bad file can still waste memory and time.

The archive is a zip file; below its one top folder it has

    models/model.json                            the graph: inputs, nodes (operator, arguments, results), output
    data/weights/, data/constants/               model_{weights,constants}_config.json: shape and type of each tensor;
                                                 weight_<i>, tensor_<i>: its numbers
    data/sample_inputs/model.pt                  empty
    archive_format, archive_version, byteorder, .data/version, .data/serialization_id    a word each
"""
import json
import math
import operator
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch

MOST_BYTES = 256 * 2 ** 20  # of a file; a policy of the size of those here has 1 MB
MOST_JSON = 32 * 2 ** 20
SCHEMA = 8  # major version of the graph's format; torch 2.13 writes 8.20

MEMBERS = re.compile(r"models/model\.json|data/(weights|constants)/model_\1_config\.json|data/sample_inputs/model\.pt"
                     r"|data/weights/weight_\d+|data/constants/tensor_\d+"
                     r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)")
WORDS = {"archive_format": rb"pt2", "archive_version": rb"0", "byteorder": sys.byteorder.encode(),
         ".data/version": rb"\d{1,4}\n?", ".data/serialization_id": rb"\d{0,64}", "data/sample_inputs/model.pt": rb""}
NEEDED = {"models/model.json", "data/weights/model_weights_config.json", "data/constants/model_constants_config.json",
          "archive_format", "archive_version", "byteorder", "data/sample_inputs/model.pt"}

DTYPES = {1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16,
          7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16}
MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
STRIDED = 7  # the only layout

# Functions of tensors and numbers that touch nothing else, and read and write no memory but that of tensors they check.
# Names as in torch.ops.aten, of all overloads and also with _ at the end. Not here: what draws random numbers, leaves
# memory uninitialised, changes a tensor's storage, or reads a file (from_file).
OPERATORS = set("""
abs absolute acos acosh add addcdiv addcmul addmm alias all amax amin aminmax any arange argmax argmin argsort asin
asinh atan atan2 atanh avg_pool1d avg_pool2d baddbmm bitwise_and bitwise_not bitwise_or bitwise_xor bmm
broadcast_tensors broadcast_to bucketize cat ceil celu chunk clamp clamp_max clamp_min clip clone concat concatenate
constant_pad_nd contiguous conv1d conv2d copy copysign cos cosh cosine_similarity cross cummax cummin cumprod cumsum
deg2rad detach diag diag_embed diagonal diff div divide dot einsum elu embedding eq erf erfc exp exp2 expand expand_as
expm1 fill flatten flip floor floor_divide fmax fmin fmod frac full full_like gather ge gelu glu greater greater_equal
group_norm gt hardsigmoid hardswish hardtanh heaviside hypot index index_add index_fill index_put index_select
instance_norm isclose isfinite isinf isnan isneginf isposinf item kron layer_norm le leaky_relu lerp less less_equal
lift_fresh lift_fresh_copy linalg_cross linalg_norm linalg_vector_norm linear linspace log log10 log1p log2
log_sigmoid log_softmax logaddexp logaddexp2 logcumsumexp logical_and logical_not logical_or logical_xor logit
logsumexp lt masked_fill masked_scatter matmul max max_pool1d max_pool2d maximum mean median meshgrid min minimum mish
mm moveaxis movedim mT mul multiply mv nan_to_num narrow native_group_norm native_layer_norm ne neg negative new_full
new_ones new_zeros norm not_equal numpy_T one_hot ones ones_like outer pad permute pow prelu prod rad2deg reciprocal
relu relu6 remainder repeat repeat_interleave reshape rms_norm roll round rsqrt rsub scalar_tensor
scaled_dot_product_attention scatter scatter_add searchsorted select select_scatter selu sgn sigmoid sign silu sin
sinc sinh size slice slice_scatter softmax softplus softsign sort split split_with_sizes sqrt square squeeze stack std
std_mean sub subtract sum swapaxes swapdims sym_constrain_range sym_constrain_range_for_size sym_numel sym_size t
take_along_dim tan tanh tensor_split threshold tile to topk transpose tril triu true_divide trunc type_as unbind
unflatten unfold unsqueeze var var_mean view view_as where xlogy zero zeros zeros_like __and__ __iand__ __ior__
__ixor__ __or__ __xor__ _assert_scalar _assert_tensor_metadata _local_scalar_dense _log_softmax _softmax _to_copy
_unsafe_view
""".split())
ARITHMETIC = {f"_operator.{name}": getattr(operator, name) for name in (
    "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_")} | {
    f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")} | {
    f"torch.{name}": getattr(torch, name) for name in ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not")}


class BadArchive(Exception):
    """A file that is no policy, or holds more than one. The message says what is wrong, in a few words."""


class Name(str):
    """The name of a value of the graph, among arguments."""


class Device:
    """Stands among arguments for the device of the observations, whichever the file names."""


@dataclass
class Program:
    """A graph that can be played.

    entries: names of the observations, [""] where they are one tensor. sizes: for each, its size without the batch.
    dtypes: their types. width: numbers per action.
    """
    entries: list[str]
    sizes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    width: int
    inputs: list[str]  # names of their values in the graph
    output: str
    steps: list[tuple[Callable, list, dict, list]]  # operator, arguments, named arguments, names of the results
    tensors: dict[str, torch.Tensor]  # weights and constants

    @torch.no_grad()
    def __call__(self, obs: list[torch.Tensor]) -> torch.Tensor:
        """What the policy returns, (B, width), for observations in the order of `entries`."""
        device = obs[0].device
        if any(x.device != device for x in self.tensors.values()):
            self.tensors = {name: x.to(device) for name, x in self.tensors.items()}
        values: dict[str, Any] = self.tensors | dict(zip(self.inputs, obs))

        def value(argument: Any) -> Any:
            if isinstance(argument, list):
                return [value(x) for x in argument]
            if isinstance(argument, Name):
                return values[argument]
            return device if argument is Device else argument

        for function, arguments, named, results in self.steps:
            given = function(*map(value, arguments), **{name: value(x) for name, x in named.items()})
            _store(values, results, given)
        return values[self.output]


def _store(values: dict[str, Any], results: list, given: Any) -> None:
    """Name what an operator gave: nothing, one value or several; a value may be a list, with a name for each part."""
    if len(results) == 1:
        given = [given]
    for i, result in enumerate(results):
        if isinstance(result, list):
            values.update(zip(result, given[i]))
        else:
            values[result] = given[i]


def read(file: Path) -> Program:
    """The policy in `file`. Raises BadArchive for anything else than one, OSError where it cannot be read."""
    try:
        members = _members(file)
        model = json.loads(members["models/model.json"])
        if model["schema_version"]["major"] != SCHEMA:
            raise BadArchive(f"torch {model.get('torch_version')!s:.20} wrote it in a format of its own")
        tensors = _tensors(members, "weights", "weight_") | _tensors(members, "constants", "tensor_")
        return _program(model["graph_module"], tensors)
    except (BadArchive, OSError):
        raise
    except Exception as error:  # a damaged or foreign file raises anything from KeyError to struct.error
        raise BadArchive(f"{type(error).__name__}: {error}".splitlines()[0][:120]) from error


def _members(file: Path) -> dict[str, bytes]:
    """{name below the top folder: content}. Stored as they are, together no longer than the file: nothing unfolds."""
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise BadArchive(f"it has {size} bytes, a policy at most {MOST_BYTES}")
    with zipfile.ZipFile(file) as archive:
        found = archive.infolist()
        tops = {info.filename.partition("/")[0] for info in found}
        names = [info.filename.partition("/")[2] for info in found]
        if len(tops) != 1 or len(set(names)) != len(names):
            raise BadArchive("it holds the same name twice, or more than one folder")
        if sum(info.file_size for info in found) > size or any(info.compress_type != zipfile.ZIP_STORED
                                                               for info in found):
            raise BadArchive("it is compressed, which policies are not")
        for info, name in zip(found, names):
            if not MEMBERS.fullmatch(name):
                raise BadArchive(f"it holds {name!r:.60}, which a policy does not")
            if name.endswith("json") and info.file_size > MOST_JSON:
                raise BadArchive(f"{name} has {info.file_size} bytes, at most {MOST_JSON} are read")
        members = {name: archive.read(info) for info, name in zip(found, names)}
    if missing := NEEDED - members.keys():
        raise BadArchive(f"it lacks {min(missing)}")
    for name, word in WORDS.items():
        if name in members and not re.fullmatch(word, members[name]):
            raise BadArchive(f"its {name} is not that of a policy")
    return members


def _tensors(members: dict[str, bytes], kind: str, prefix: str) -> dict[str, torch.Tensor]:
    """{name: tensor} of what data/<kind>/ holds, on the CPU."""
    tensors = {}
    for name, entry in json.loads(members[f"data/{kind}/model_{kind}_config.json"])["config"].items():
        meta = entry["tensor_meta"]
        if entry["use_pickle"] is not False or not entry["path_name"].startswith(prefix):
            raise BadArchive(f"its {name!r:.60} is a pickle")
        sizes, strides = ([_whole(x["as_int"]) for x in meta[key]] for key in ("sizes", "strides"))
        if meta["layout"] != STRIDED:
            raise BadArchive(f"its {name!r:.60} is not a plain tensor")
        dtype, data = DTYPES[meta["dtype"]], members[f"data/{kind}/{entry['path_name']}"]
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.zeros(0, dtype=dtype)
        if math.prod(sizes) != len(flat):  # a stride of 0 would unfold one number into any size
            raise BadArchive(f"its {name!r:.60} has {len(flat)} numbers for a size of {sizes}")
        tensors[name] = flat.as_strided(sizes, strides, _whole(meta["storage_offset"]["as_int"]))  # checks its bounds
    return tensors


def _whole(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise BadArchive(f"{number!r:.40} is no size")
    return number


def _program(module: dict, tensors: dict[str, torch.Tensor]) -> Program:
    """The graph of models/model.json, with `tensors` for its weights."""
    graph, signature = module["graph"], module["signature"]
    inputs, held = [], {}
    for spec in signature["input_specs"]:
        (kind, spec), = spec.items()
        if kind == "user_input":
            inputs.append(spec["arg"]["as_tensor"]["name"])
        elif kind in ("parameter", "buffer", "tensor_constant"):
            held[spec["arg"]["name"]] = tensors[spec[f"{kind}_name"]]
        else:
            raise BadArchive(f"it takes a {kind!r:.40}")
    outputs = [spec["user_output"]["arg"]["as_tensor"]["name"] for spec in signature["output_specs"]]
    call, = (entry["signature"] for entry in module["module_call_graph"] if entry["fqn"] == "")
    entries, values = _entries(json.loads(call["in_spec"])[1]), graph["tensor_values"]
    if len(outputs) != 1 or len(entries) != len(inputs) or not inputs:
        raise BadArchive("it does not map observations to actions")
    shapes = [values[name]["sizes"] for name in (*inputs, *outputs)]
    if any("as_expr" not in shape[0] for shape in shapes):
        raise BadArchive("it is made for one batch size")
    sizes = [tuple(_whole(x["as_int"]) for x in shape[1:]) for shape in shapes]
    steps = [_step(node) for node in graph["nodes"]]
    dtypes = [DTYPES[values[name]["dtype"]] for name in inputs]
    width, = sizes.pop()
    return Program(entries, sizes, dtypes, width, inputs, outputs[0], steps, held)


def _entries(spec: dict) -> list[str]:
    """Names of the observations, from what the archive says of the one argument: a tensor, or a dict of them."""
    positional, named = spec["children_spec"]
    argument, = positional["children_spec"]
    if named["children_spec"] or any(x["children_spec"] for x in argument["children_spec"]):
        raise BadArchive("it takes something else than observations")
    if argument["type"] is None:
        return [""]
    if argument["type"] != "builtins.dict":
        raise BadArchive(f"it takes a {argument['type']!r:.40}")
    return [str(name) for name in json.loads(argument["context"])]


def _step(node: dict) -> tuple[Callable, list, dict, list]:
    """One node as an operator of the list above, its arguments, and the names of what it gives."""
    target = node["target"]
    function = ARITHMETIC.get(target) or _aten(target)
    arguments = [_argument(x["arg"]) for x in node["inputs"] if x.get("kind") != 2]
    named = {x["name"]: _argument(x["arg"]) for x in node["inputs"] if x.get("kind") == 2}
    return function, arguments, named, [_result(x) for x in node["outputs"]]


def _aten(target: str) -> torch._ops.OpOverload:
    """The operator that `target` names, torch.ops.aten.<operator>.<overload>, if it is on the list."""
    parts = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", target)
    if not parts or not {parts[1], parts[1].removesuffix("_")} & OPERATORS:
        raise BadArchive(f"it uses {target!r:.60}, which is not among the operators that are played")
    name = "detach" if parts[1] == "detach_" else parts[1]  # of torch.tensor([...]); in place no run could export it
    overload = getattr(getattr(torch.ops.aten, name, None), parts[2], None)
    if not isinstance(overload, torch._ops.OpOverload) or any(x.is_out for x in overload._schema.arguments):
        raise BadArchive(f"it uses {target!r:.60}, which is no function")
    return overload


def _argument(argument: dict) -> Any:
    """One argument of an operator: a value, or the Name of one of the graph's."""
    (kind, value), = argument.items()
    match kind:
        case "as_none":
            return None
        case "as_tensor":
            return Name(value["name"])
        case "as_tensors":
            return [Name(x["name"]) for x in value]
        case "as_optional_tensor":
            return _argument(value)
        case "as_optional_tensors" | "as_sym_ints" | "as_sym_floats" | "as_sym_bools":
            return [_argument(x) for x in value]
        case "as_sym_int" | "as_sym_float" | "as_sym_bool":
            return _argument(value)
        case "as_name":
            return Name(value)
        case "as_int" | "as_float" | "as_bool" | "as_string":
            return _plain(value)
        case "as_ints" | "as_floats" | "as_bools":
            return [_plain(x) for x in value]
        case "as_scalar_type":
            return DTYPES[value]
        case "as_memory_format":
            return MEMORY_FORMATS[value]
        case "as_layout" if value == STRIDED:
            return torch.strided
        case "as_device":
            return Device
    raise BadArchive(f"an operator takes a {kind!r:.40}")


def _plain(value: Any) -> int | float | bool | str:
    if not isinstance(value, (int, float, str)):
        raise BadArchive("an argument is no number")
    if value in ("Infinity", "-Infinity", "NaN"):
        return float(value)
    return value


def _result(result: dict) -> str | list[str]:
    """The name of one result of an operator, or names where it is a list."""
    (kind, value), = result.items()
    match kind:
        case "as_none":
            return ""
        case "as_tensor":
            return value["name"]
        case "as_tensors":
            return [x["name"] for x in value]
        case "as_sym_int" | "as_sym_float" | "as_sym_bool":
            return value["as_name"]
    raise BadArchive(f"an operator gives a {kind!r:.40}")
