"""The command line: complete tables when piped, and one clear line for an error."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

import mom_compile
from mom_compile.cli import main
from mom_compile.cli.inputs import backend_options
from mom_compile.cli.plan import CARDS, as_data, contexts, show
from mom_compile.planning.configs import PlanError

ROOT = Path(__file__).resolve().parent.parent
GIB = 1 << 30
#: The module, which is hidden by its command of the same name.


@dataclass(frozen=True)
class Way:
    """A weight of one GiB, and a fixed number of bytes per token."""

    what: str
    each: int
    on_host: int = 0

    def peak_bytes(self, seq_len):
        return GIB + self.each * seq_len

    def host_bytes(self, seq_len):
        return self.on_host * seq_len

    def step_bytes(self, seq_len):
        return self.peak_bytes(seq_len)

    def max_seq_len(self, budget):
        return max(0, (budget - GIB) // self.each)

    @property
    def fewest_bytes(self):
        return self.peak_bytes(2)


@dataclass(frozen=True)
class Estimate:
    seconds: float
    bound: str

    def __str__(self):
        return f"about {self.seconds:.0f} s, bound by {self.bound}"


@dataclass(frozen=True)
class Speed:
    tokens_per_second: float = 12.5
    bound: str = "memory bandwidth"


@dataclass
class Plan:
    """The attributes of a plan that the command line reads."""

    seq_len: int = 100_000
    batch_size: int = 1
    device: str = "H100"
    notes: list = field(default_factory=lambda: ["100,000 tokens are more than the 8,192 it is made for"])
    way: str = "mom"
    formula: str = "1024*s"
    tensor_parallel: int = 1
    kv_bytes_per_token: int = 1 << 17
    ways: dict = field(
        default_factory=lambda: {
            "eager": Way("eager", 1 << 20),
            "mom": Way("ours", 1 << 14),
            "mom-cache": Way("ours, cache on the host", 1 << 12, 1 << 11),
        }
    )

    @property
    def subject(self):
        return SimpleNamespace(
            name="Small", model_type="llama", layers=2, parameters=5 * 10**8, weight_bytes=GIB, longest=8192,
            dtype="bfloat16", stored="gptq and bfloat16",
        )  # fmt: skip

    @property
    def memory(self):
        return None if self.device == "cpu" else 80 * GIB

    def estimate(self, device=None, way=None):
        if (device or self.device) == "cpu":
            raise PlanError("no figures of a CPU")
        return Estimate(9.0, "arithmetic")

    def estimate_decode(self, device=None, way=None):
        return Speed()

    def plot(self, path, memories):
        path.write_text(str(memories))


@pytest.fixture
def asked(monkeypatch):
    """Records the arguments of plan(), which always returns the same plan."""
    calls = []

    def plan(model, **given):
        given.pop("progress")("half of it")
        calls.append((model, given))
        return Plan(
            seq_len=given["seq_len"], device=given["device"], tensor_parallel=given.get("tensor_parallel", 1)
        )

    monkeypatch.setattr(mom_compile, "plan", plan, raising=False)
    return calls


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


def test_options_are_passed_to_plan(run, asked):
    code, _, err = run(
        "plan", "Llama-3-8B", "--seq-len", "455k", "--device-memory", "80GiB", "--batch-size", "2",
        "--dtype", "float16", "--device", "A100", "--option", "kv_offload=true", "-o", "mini_seq_len=2048",
    )  # fmt: skip
    assert (code, err) == (0, "")
    given = {"seq_len": 455_000, "batch_size": 2, "dtype": "float16", "device": "A100", "weights_on_host": False}
    assert asked == [("Llama-3-8B", {**given, "kv_offload": True, "mini_seq_len": 2048})]


def test_ranks_are_passed_to_plan_and_printed(run, asked):
    code, out, _ = run("plan", "Llama-3-8B", "--seq-len", "100k", "--tensor-parallel", "4")
    assert code == 0 and asked[0][1]["tensor_parallel"] == 4
    assert "128 KiB of cache per token on each of 4 ranks" in " ".join(out.split())


def test_the_default_length_is_the_models(run, asked):
    assert run("plan", "Qwen3-30B-A3B")[0] == 0
    assert asked[0][1]["seq_len"] == 40960


def test_contexts_are_powers_of_two_and_the_length_itself():
    assert contexts(455_000) == [2048 << i for i in range(8)] + [455_000]
    assert contexts(4096) == [1024, 2048, 4096] and contexts(1025) == [1024, 1025] and contexts(7) == [7]


def test_the_default_memory_is_the_devices(run, asked):
    for given, memory in (((), None), (("--device", "4090"), 24), (("--device", "4090", "--device-memory", "4GiB"), 4)):
        code, out, _ = run("plan", "Llama-3-8B", "--seq-len", "100k", "--json", *given)
        data = json.loads(out)
        assert code == 0 and data["device_memory"] == (80 if memory is None else memory) * GIB
        sizes = CARDS if memory is None else (memory * GIB,)
        assert list(data["ways"]["mom"]["max_seq_len"]) == [str(size) for size in sizes]
    assert asked[0][1]["device"] == "H100" and asked[1][1]["device"] == "4090"


def test_weight_bits_are_passed_to_plan(run, asked):
    assert run("plan", "Llama-3-8B", "--seq-len", "4k", "--weight-bits", "4")[0] == 0
    assert asked[0][1]["weight_bits"] == 4


def test_ways_that_fit_have_times_and_others_their_bytes(run, asked):
    out = run("plan", "Llama-3-8B", "--seq-len", "100k", "--device-memory", "2GiB")[1]
    assert re.search(r"eager +99 GiB +does not fit *$", out, re.MULTILINE)
    assert re.search(r"ours, cache on the host +1\.4 GiB +195 MiB +9\.0 s +12\.5 tokens/s +memory bandwidth", out)
    assert re.search(r"^ours +2\.5 GiB +does not fit|^ ours +2\.5 GiB +does not fit", out, re.MULTILINE)
    assert "time of ours: none, since 2.5 GiB (2,712,141,824 bytes) do not fit into 2.0 GiB" in out
    data = json.loads(run("plan", "Llama-3-8B", "--seq-len", "100k", "--device-memory", "2GiB", "--json")[1])
    assert (data["seconds"], data["decode"], data["ways"]["mom"]["fits"]) == (None, None, False)
    assert data["ways"]["mom-cache"]["decode"] == {"tokens_per_second": 12.5, "bound": "memory bandwidth"}
    out = run("plan", "Llama-3-8B", "--seq-len", "100k", "--device-memory", "1GiB")[1]
    assert re.search(r"eager +none, needs 1\.0 GiB", out)


def test_without_colours_a_star_marks_what_does_not_fit(run, asked):
    code, out, _ = run("plan", "Llama-3-8B", "--seq-len", "100k", "--device-memory", "4GiB")
    lines = out.splitlines()
    row = next(line for line in lines if line.split()[:1] == ["65,536"])
    assert code == 0 and row.split() == ["65,536", "65.0*", "2.00", "1.25"]
    row = next(line for line in lines if line.split()[:1] == ["1,024"])
    assert row.split() == ["1,024", "2.00", "1.02", "1.00"]
    assert "*: does not fit into 4.0 GiB" in out and "\x1b" not in out
    assert re.search(r"ours, cache on the host +786,432 +1\.5 GiB", out)
    assert "note: 100,000 tokens are more than" in out and "time of ours: about 9 s, bound by arithmetic" in out


def test_on_a_terminal_what_does_not_fit_is_red():
    out, data = io.StringIO(), as_data(Plan(), [4 * GIB], 4 * GIB)
    show(Console(file=out, force_terminal=True, width=120, color_system="standard", highlight=False), data, 4 * GIB)
    row = next(line for line in out.getvalue().splitlines() if "65,536" in line)
    assert re.search(r"\x1b\[31m *65\.0\x1b\[0m +2\.00", row)
    assert "in red: does not fit into 4.0 GiB" in out.getvalue()


def test_piped_tables_are_not_cut(run, asked, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    out = run("plan", "Llama-3-8B", "--seq-len", "100k")[1]
    assert "…" not in out and "note: 100,000 tokens are more than the 8,192 it is made for\n" in out
    assert re.search(r"way +in 16 GiB +in 24 GiB +in 48 GiB +in 80 GiB +then on the host", out)


def test_json_output(run, asked):
    code, out, _ = run("plan", "Llama-3-8B", "--seq-len", "100k", "--device-memory", "4GiB", "--json")
    data = json.loads(out)
    assert code == 0 and data["seq_len"] == 100_000 and data["subject"]["weight_bytes"] == GIB
    assert data["ways"]["mom"]["peak_bytes"]["65536"] == GIB + (65536 << 14)
    assert data["ways"]["eager"]["max_seq_len"] == {str(4 * GIB): 3072}
    assert data["ways"]["mom-cache"]["host_bytes_then"] == {str(4 * GIB): 3 << 29}
    assert (data["seconds"], data["bound"]) == (9.0, "arithmetic")


def test_without_a_known_speed_all_other_output_is_shown(run, asked):
    code, out, _ = run("plan", "Llama-3-8B", "--seq-len", "4k", "--device", "cpu")
    assert code == 0 and "no estimate: no figures of a CPU" in out and "longest context" in out
    assert json.loads(run("plan", "Llama-3-8B", "--seq-len", "4k", "--device", "cpu", "--json")[1])["seconds"] is None


def test_a_plot_has_lines_for_the_given_memory_or_usual_cards(run, asked, tmp_path):
    for given, memories in (((), CARDS), (("--device-memory", "4GiB"), (4 * GIB,))):
        assert run("plan", "Llama-3-8B", "--seq-len", "4k", "--plot", str(tmp_path / "out.png"), *given)[0] == 0
        assert (tmp_path / "out.png").read_text() == str(memories)


def test_progress_is_shown_on_a_terminal(run, asked, monkeypatch):
    assert run("plan", "Llama-3-8B", "--seq-len", "4k")[2] == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, out, err = run("plan", "Llama-3-8B", "--seq-len", "4k")
    assert code == 0 and "half of it" in err and "half of it" not in out and "\x1b[" in out
    monkeypatch.setenv("NO_COLOR", "1")
    out = run("plan", "Llama-3-8B", "--seq-len", "100k", "--device-memory", "4GiB")[1]
    assert re.search(r"65,536 +65\.0\* +2\.00", out) and "*: does not fit" in out


BAD = [
    (("plan", "no-such-model"), "no-such-model' is not a folder, a file or a shipped shape"),
    (("plan", "llama-8b"), "did you mean 'Llama-3-8B'?"),
    (("plan", "Llama-3-8B", "--seq-len", "many"), "--seq-len='many' is not valid; it is a whole number of tokens"),
    (("plan", "Llama-3-8B", "--seq-len", "-5"), "--seq-len='-5' is not valid"),
    (("plan", "Llama-3-8B", "--seq-len", "1e400"), "--seq-len='1e400' is not valid"),
    (("plan", "Llama-3-8B", "--seq-len", "nan"), "--seq-len='nan' is not valid"),
    (("plan", "Llama-3-8B", "--device-memory", "80 elephants"), "--device-memory='80 elephants' is not valid"),
    (("plan", "Llama-3-8B", "--device-memory", "24"), "--device-memory='24' is not valid; 24 is a number of bytes"),
    (("plan", "Llama-3-8B", "--device", "RTX 409"), "did you mean 'RTX 4090'?"),
    (("plan", "Llama-3-8B", "--batch-size", "0"), "--batch-size"),
    (("plan", "Llama-3-8B", "--dtype", "int4"), "'int4' is not one of 'bfloat16', 'float16', 'float32'"),
    (("plan", "Llama-3-8B", "--option", "kv_offload"), "--option 'kv_offload' is not valid; expected NAME=VALUE"),
    (("plan", "Llama-3-8B", "--option", "kv_ofload=true"), "(did you mean 'kv_offload'?)"),
    (("plan", "Llama-3-8B", "--option", "seq_len=5"), "unknown option 'seq_len'"),
    (("plan", "Llama-3-8B", "-o", "strict=true", "-o", "strict=false"), "--option strict is given twice"),
    (("plan", "Llama-3-8B", "--option", "mini_seq_len=1"), "mini_seq_len=1 is not valid"),
    (("plan", "Llama-3-8B", "--plot", "/no/such/folder/out.png"), "the folder '/no/such/folder' does not exist"),
    (("plan", "Llama-3-8B", "--seqlen", "5"), "--seq-len"),
    (("plan",), "Missing argument 'CONFIG'"),
    (("explain", "Llama-3-8B", "--seq-len", "0"), "--seq-len='0' is not valid"),
    (("explain", "no-such-model"), "a shipped shape"),
    (("explain", "Llama-3-8B", "--option", "scope=all"), "scope='all' is not valid"),
    (("pland",), "No such command 'pland'"),
]


@pytest.mark.parametrize(("arguments", "why"), BAD, ids=lambda value: " ".join(value)[:40] if value else "")
def test_invalid_input_prints_one_line_and_exits_with_2(run, asked, monkeypatch, arguments, why):
    if arguments[1:2] in (("no-such-model",), ("llama-8b",)):
        monkeypatch.setattr(mom_compile, "plan", lambda model, **given: pytest.fail("was planned"))
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and not asked
    assert err.startswith("mom-compile: ") and err.count("\n") == 1 and why in err


def test_a_plan_error_prints_one_line(run, monkeypatch):
    def refuses(model, **given):
        raise PlanError("the weights take 15 GiB\nand the budget is 8 GiB")

    monkeypatch.setattr(mom_compile, "plan", refuses, raising=False)
    code, out, err = run("plan", "Llama-3-8B")
    assert (code, out, err) == (2, "", "mom-compile: the weights take 15 GiB and the budget is 8 GiB\n")


def test_internal_errors_are_not_reported_as_invalid_input(monkeypatch):
    def breaks(model, **given):
        raise RuntimeError("ours")

    monkeypatch.setattr(mom_compile, "plan", breaks, raising=False)
    with pytest.raises(RuntimeError, match="ours"):
        main(["plan", "Llama-3-8B"])


def test_option_values_are_parsed_by_type():
    texts = ["kv_offload=true", "mini-seq-len=512", "scope=mlp", "kv_dir=none", "inductor.max_autotune=false",
             "inductor.x=1.5", "memory_budget=24GiB"]  # fmt: skip
    assert backend_options(texts) == {
        "kv_offload": True, "mini_seq_len": 512, "scope": "mlp", "kv_dir": None,
        "inductor": {"max_autotune": False, "x": 1.5}, "memory_budget": "24GiB",
    }  # fmt: skip


def test_a_small_model_is_explained_as_a_table_and_in_full(run, tmp_path, monkeypatch):
    """The model is traced once."""
    made = mom_compile.explain
    traced = []

    def explained(config, **given):
        traced.append(given)
        return kept[0] if kept else kept.append(made(config, **given)) or kept[0]

    kept = []
    monkeypatch.setattr(mom_compile, "explain", explained)
    fields = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
              "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    code, out, err = run("explain", str(tmp_path), "--seq-len", "600", "-o", "mini_seq_len=64", "--dtype", "float16")
    assert (code, err) == (0, "") and "\x1b" not in out
    first, second, *_ = out.splitlines()
    assert first == f"{tmp_path.name} (llama), a prefill of 1 x 600 tokens"
    assert second.startswith("prefill of 600 tokens: expected peak ")
    asked = {"seq_len": 600, "batch_size": 1, "dtype": "float16", "options": {"mini_seq_len": 64}}
    assert traced == [asked]
    assert re.search(r"attention to all tokens +stage_\d", out)
    details = run("explain", str(tmp_path), "--seq-len", "600", "-o", "mini_seq_len=64", "--details")[1]
    assert details.count("alive meanwhile") >= 3 and "600 tokens in mini-sequences of 64" in details


@pytest.mark.parametrize("arguments", [(), ("--help",), ("plan", "--help"), ("explain", "-h"), ("doctor", "-h")])
def test_help_lists_the_commands(run, arguments):
    code, out, err = run(*arguments)
    assert (code, err) == (0, "") and out.startswith("Usage: mom-compile")
    if not arguments:
        assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in ("plan", "explain", "doctor"))


def test_the_script_calls_main():
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["mom-compile"]
    assert script == f"{main.__module__.removesuffix('.commands')}:main"


@pytest.mark.slow
def test_the_module_can_be_run():
    command = [sys.executable, "-m", "mom_compile.cli", "plan", "--seq-len", "x", "y"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("mom-compile: --seq-len='x' is not valid")
    assert "Traceback" not in done.stderr
