#!/usr/bin/env python3
"""Breaks our code in listed ways, and shows that the tests notice each of them.

Every mutation changes one place of one file, in a copy of the installed sglang made of
links; the named tests then run against the copy, on the CPU with emulated kernels.
First they all run against an unchanged copy. Exit status 1 when a mutation survives,
when a test does not pass unmutated, or when a mutation breaks more than tests.

Run in the environment of scripts/setup.sh. Nothing that is installed is changed.
"""

import argparse
import datetime
import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator, List, Optional, Tuple

ROOT = Path(__file__).resolve().parent.parent
TESTS = "test/registered"
EMULATION = f"{TESTS}/quant/test_mxfp8_emulation.py"
LAYOUT = f"{TESTS}/quant/test_mxfp8_layout.py"
LINEAR = f"{TESTS}/quant/test_mxfp8_linear.py"
FORMATS = f"{TESTS}/quant/test_mxfp8_formats.py"
LOADERS = f"{TESTS}/quant/test_mxfp8_loader_branches.py"
LOAD_PATHS = f"{TESTS}/rl/test_mxfp8_load_paths.py"
MLA = f"{TESTS}/quant/test_mxfp8_mla.py::TestReaders"
ROUTING = f"{TESTS}/quant/test_mxfp8_routing.py"
# The environment of the plugin's side, in the process that runs the tests.
COPY, REPORT, PACKAGE = "MUTATION_COPY", "MUTATION_REPORT", "MUTATION_PACKAGE"


@dataclass(frozen=True)
class Mutation:
    """One way to break the code.

    Attributes:
        breaks: what is wrong then, for the report.
        file: relative to the package.
        old, new: the text that is replaced, found exactly once, and its replacement.
        tests: arguments of pytest, files first; they should fail.
    """

    name: str
    breaks: str
    file: str
    old: str
    new: str
    tests: Tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What became of one run.

    Attributes:
        status: killed, survived or error.
        detail: the first test that failed, or what went wrong.
        why: the first line of that test's failure.
    """

    status: str
    detail: str
    seconds: float
    why: str = ""


QUANTIZATION = "srt/layers/quantization"


def _in(file: str) -> str:
    return f"{QUANTIZATION}/{file}.py"


LAYOUT_PY, WEIGHTS_PY = _in("mxfp8_layout"), _in("mxfp8_weights")
EMULATION_PY, ROUTING_PY = _in("mxfp8_emulation"), _in("mxfp8_routing")
UTILS_PY, MODEL_PY = _in("fp8_utils"), _in("mxfp8_model")
CHECK_PY, KERNEL_PY = _in("mxfp8_update_check"), _in("mxfp8_shuffle_kernel")
FORMATS_PY = _in("mxfp8_formats")

MUTATIONS = (
    Mutation(
        "row-map",
        "the trtllm row map is its own inverse's, everywhere",
        LAYOUT_PY,
        "matrix.view(rows // SHUFFLE_ROWS, outer, inner, columns)",
        "matrix.view(rows // SHUFFLE_ROWS, inner, outer, columns)",
        (LAYOUT,),
    ),
    Mutation(
        "row-map-of-the-kernel",
        "the Triton kernel rotates a wrong cycle of rows",
        KERNEL_PY,
        "row3 = row2 * FACTOR % 31",
        "row3 = row2 * FACTOR % 32",
        (LAYOUT,),
    ),
    Mutation(
        "unshuffle-is-shuffle",
        "restoring a weight shuffles it again",
        LAYOUT_PY,
        "return _permute_blocks_(weight, 4, 8)",
        "return _permute_blocks_(weight, 8, 4)",
        (LINEAR,),
    ),
    Mutation(
        "scale-not-shuffled",
        "a trtllm weight is shuffled, its scale is not",
        WEIGHTS_PY,
        " swizzle_scale_(kernel_scale(scale), *scale.shape, shuffled)",
        " swizzle_scale_(kernel_scale(scale), *scale.shape, False)",
        (LINEAR,),
    ),
    Mutation(
        "scale-row-map",
        "the shuffled scale has a row map of its own, undone by its own inverse",
        LAYOUT_PY,
        "return 4, 8, 4",
        "return 8, 4, 4",
        (LAYOUT,),
    ),
    Mutation(
        "tile-row-order",
        "rows within a 128x4 tile are in another order, undone by its own inverse",
        LAYOUT_PY,
        "return (4, 32, 1) if row_tile == 128",
        "return (32, 4, 1) if row_tile == 128",
        (LAYOUT,),
    ),
    Mutation(
        "neighbour-row",
        "each row of a weight gets the scale of its neighbour",
        LAYOUT_PY,
        "copy = _plain_view(_pad(plain, 128), 128, shuffle)",
        "copy = _plain_view(_pad(plain.roll(1, 0), 128), 128, shuffle)",
        (LINEAR,),
    ),
    Mutation(
        "padding-not-zero",
        "a scale's padding is not zero",
        LAYOUT_PY,
        "pad(scale.contiguous(), padding)",
        "pad(scale.contiguous(), padding, value=127)",
        (LAYOUT,),
    ),
    Mutation(
        "missing-padding",
        "a scale's rows are not padded",
        LAYOUT_PY,
        "return align(rows, row_tile) * align(groups, SCALE_GROUP_TILE)",
        "return rows * align(groups, SCALE_GROUP_TILE)",
        (LINEAR,),
    ),
    Mutation(
        "padding-first",
        "a scale's padding comes before its groups, not after them",
        LAYOUT_PY,
        "padding = (0, -groups % SCALE_GROUP_TILE, 0, -rows % row_tile)",
        "padding = (-groups % SCALE_GROUP_TILE, 0, 0, -rows % row_tile)",
        (LINEAR,),
    ),
    Mutation(
        "padding-read-as-groups",
        "a restored scale is read from the end of its padded rows",
        LAYOUT_PY,
        "plain.copy_(padded[: len(plain), :groups])",
        "plain.copy_(padded[: len(plain), -groups:])",
        (LINEAR,),
    ),
    Mutation(
        "slabs-forwards",
        "a large scale is padded from its start, over what is still to be read",
        LAYOUT_PY,
        "in reversed(list(_scale_slabs(room, rows, groups, shuffle)))",
        "in list(_scale_slabs(room, rows, groups, shuffle))",
        (LAYOUT,),
    ),
    Mutation(
        "groups-permuted",
        "a row's scales belong to its groups in reverse",
        EMULATION_PY,
        "return (groups * factor.unsqueeze(-1)).view(n, k)",
        "return (groups * factor.flip(1).unsqueeze(-1)).view(n, k)",
        (EMULATION,),
    ),
    Mutation(
        "scale-byte-off-by-one",
        "a scale byte b means 2^(b-126)",
        EMULATION_PY,
        "scale.to(torch.int32) - 127",
        "scale.to(torch.int32) - 126",
        (EMULATION,),
    ),
    Mutation(
        "scale-rounded-down",
        "amax / 448 is rounded down to a power of two",
        EMULATION_PY,
        "byte = (bits >> 23) + ((bits & 0x7FFFFF) != 0)",
        "byte = bits >> 23",
        (EMULATION,),
    ),
    Mutation(
        "8x4-for-128x4",
        "activations are quantized in the layout that the GEMM is not told",
        UTILS_PY,
        "input, input_scale = quantize(input.contiguous(), use_8x4)",
        "input, input_scale = quantize(input.contiguous(), not use_8x4)",
        (LINEAR,),
    ),
    Mutation(
        "8x4-for-a-given-128x4-scale",
        "a quantized input's 128x4 scale is called 8x4",
        UTILS_PY,
        "        else:\n            use_8x4 = False\n",
        "",
        (LINEAR,),
    ),
    Mutation(
        "max-m-off-by-one",
        "the largest M of the 8x4 layout gets 128x4",
        UTILS_PY,
        "use_8x4 = m <= max_m_8x4",
        "use_8x4 = m < max_m_8x4",
        (ROUTING, "-k", "EveryBackend and not compiled"),
    ),
    Mutation(
        "8x4-where-refused",
        "8x4 is chosen for N that FlashInfer refuses it for",
        ROUTING_PY,
        "backend != TRTLLM or n % 128 != 0 or options",
        "backend != TRTLLM or options",
        (ROUTING, "-k", "Select and not readme"),
    ),
    Mutation(
        "trtllm-for-any-k",
        "trtllm is chosen for K % 256 != 0",
        ROUTING_PY,
        "if k % 256 != 0:",
        "if k % 32 != 0:",
        (LINEAR,),
    ),
    Mutation(
        "cutlass-for-any-n",
        "a layer with N % 32 != 0 is not left to bf16",
        ROUTING_PY,
        "if n % 32 != 0:",
        "if n % 8 != 0:",
        (LINEAR,),
    ),
    Mutation(
        "autotune-guard",
        "FlashInfer's autotuner tunes the GEMM",
        UTILS_PY,
        "tuning = tuner.is_tuning_mode and (old or use_8x4_sf_layout)",
        "tuning = False",
        (ROUTING, "-k", "Autotuning"),
    ),
    Mutation(
        "processed-twice",
        "a weight in kernel form is rearranged again",
        WEIGHTS_PY,
        "if self.in_kernel_form or self.held:",
        "if self.held:",
        (LINEAR,),
    ),
    Mutation(
        "held-ignored",
        "a weight is rearranged while raw bytes are written",
        WEIGHTS_PY,
        "if self.in_kernel_form or self.held:",
        "if self.in_kernel_form:",
        (LINEAR,),
    ),
    Mutation(
        "written-in-kernel-form",
        "an update writes into rearranged bytes",
        WEIGHTS_PY,
        "loaded = self.as_bytes_of(param, name, loaded)\n"
        "            self.to_checkpoint_form()\n",
        "loaded = self.as_bytes_of(param, name, loaded)\n",
        (LINEAR,),
    ),
    Mutation(
        "left-in-checkpoint-form",
        "an updated model computes with the checkpoint's bytes",
        MODEL_PY,
        "return load_weights(weights, *args, **kwargs)\n"
        "        finally:\n"
        "            _all_to_kernel_form(layers)\n",
        "return load_weights(weights, *args, **kwargs)\n"
        "        finally:\n"
        "            pass\n",
        (LINEAR,),
    ),
    Mutation(
        "raw-writes-in-kernel-form",
        "writes past the loaders find rearranged bytes",
        MODEL_PY,
        "            weights.held = True\n            weights.to_checkpoint_form()\n",
        "            weights.held = True\n",
        (LOAD_PATHS, "-k", "not RemoteInstance and not CheckpointEngine"),
    ),
    Mutation(
        "parameter-moved",
        "processing gives a weight another address",
        WEIGHTS_PY,
        "                        shuffle_rows_(weight)\n"
        "                elif self.backend.is_bf16():",
        "                        self.layer.weight.data = shuffle_rows_(weight.clone())\n"
        "                elif self.backend.is_bf16():",
        (LINEAR,),
    ),
    Mutation(
        "bf16-copy-over-the-weight",
        "the bf16 copy lies over the e4m3 weight, not behind it",
        LAYOUT_PY,
        "start = align(n * k, 16)\n",
        "start = 0\n",
        (LINEAR,),
    ),
    Mutation(
        "bf16-copy-not-remade",
        "the bf16 copy of a weight is not made again after an update",
        WEIGHTS_PY,
        "            if not self.in_kernel_form:\n                return\n",
        "            if not self.in_kernel_form or self.backend.is_bf16():\n"
        "                return\n",
        (LINEAR,),
    ),
    Mutation(
        "e8m0-as-numbers",
        "a scale stored as float8_e8m0fnu is converted, not taken by its bytes",
        WEIGHTS_PY,
        "return loaded.view(param.dtype)",
        "return loaded.to(param.dtype)",
        (LOADERS, "-k", "EveryBranch"),
    ),
    Mutation(
        "form-read-as-checkpoint",
        "MLA reads a rearranged weight as if it were the checkpoint's",
        WEIGHTS_PY,
        "if self.in_kernel_form and self.backend.is_flashinfer():",
        "if False:",
        (MLA,),
    ),
    Mutation(
        "form-lock",
        "loader threads bring one layer back at the same time",
        WEIGHTS_PY,
        "        with _form_lock:\n            if not self.in_kernel_form:",
        "        with threading.Lock():\n            if not self.in_kernel_form:",
        (LINEAR,),
    ),
    Mutation(
        "half-rearranged-used",
        "a layer left half rearranged by an error is used",
        WEIGHTS_PY,
        "            self.layer.w8a8_mxfp8_linear = self._refuse\n",
        "",
        (LINEAR,),
    ),
    Mutation(
        "update-not-checked",
        "an update in memory is written unchecked",
        MODEL_PY,
        "agree_to_write(_refusal_of(check.tensors, weights))",
        "agree_to_write(None)",
        (LOADERS, "-k", "TwoRanks"),
    ),
    Mutation(
        "files-not-checked",
        "an update from disk is written unchecked",
        MODEL_PY,
        "model.mxfp8_update_check.files(*_files_of(loader, source), name_filter)",
        "pass",
        (LOAD_PATHS, "-k", "not RemoteInstance and not CheckpointEngine"),
    ),
    Mutation(
        "start-not-checked",
        "a checkpoint that does not fit is read, and its bytes taken as they come",
        MODEL_PY,
        "or not _reads_files(loader)",
        "or True",
        (FORMATS,),
    ),
    Mutation(
        "scale-names",
        "a scale that is called weight_scale is passed over",
        FORMATS_PY,
        'yield f"{layer}{dot}{SCALE}" if last == OTHER_SCALE else name, tensor',
        "yield name, tensor",
        (FORMATS,),
    ),
    Mutation(
        "fused-name-first",
        "a list with a part of a fused layer is taken for all of it",
        FORMATS_PY,
        "_refuse_split(name, parts, [part for part in parts if self.has(part)])",
        "pass",
        (FORMATS,),
    ),
    Mutation(
        "ranks-do-not-agree",
        "a rank writes what another one refuses",
        CHECK_PY,
        "refusal = next(filter(None, _gather(self.group, refusal)), None)",
        "_gather(self.group, refusal)",
        (LOADERS, "-k", "TwoRanks"),
    ),
)


def mutated(mutation: Mutation, source: str) -> str:
    """`source` with the mutation. Raises ValueError unless its text is there once."""
    found = source.count(mutation.old)
    if found != 1:
        raise ValueError(
            f"{mutation.name}: its text is {found} times in {mutation.file}, not once"
        )
    return source.replace(mutation.old, mutation.new)


def copy_package(package: Path, target: Path) -> None:
    """Make a copy of `package` in `target`, every file a link."""
    shutil.copytree(package, target / package.name, copy_function=os.symlink)


def apply(mutation: Mutation, copied: Path) -> None:
    """Replace the link to the mutated file by a file; its bytecode must not remain."""
    file = copied / mutation.file
    text = mutated(mutation, file.read_text())
    file.unlink()
    file.write_text(text)
    for bytecode in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
        bytecode.unlink()


def run_tests(copied: Path, tests: Iterable[str], timeout: float) -> Result:
    """Run pytest with `copied` as the package of its name; "survived" if all pass."""
    start = time.monotonic()
    report, output = copied.parent / "report.json", copied.parent / "output"
    environment = _environment(copied, report)
    process = _PROCESSES.Process(
        target=_run_pytest, args=(ROOT, environment, list(tests), output)
    )
    process.start()
    process.join(timeout)
    seconds = time.monotonic() - start
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return Result("error", f"not done after {timeout:g} s", seconds)
    return _result(process.exitcode, output, report, seconds)


# New processes are forks of one that has imported what sglang imports, and not sglang.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    [
        *("torch", "torch._inductor", "torchao", "torchvision", "flashinfer", "triton"),
        *("transformers", "transformers.modeling_utils", "accelerate", "datasets"),
        *("compressed_tensors", "xgrammar", "openai", "openai.types", "aiohttp"),
        *("scipy.stats", "pandas", "networkx", "IPython", "hypothesis", "pytest"),
    ]
)


def _run_pytest(root: Path, environment: dict, tests: List[str], output: Path) -> None:
    os.setsid()  # so that it can be stopped with what it starts
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(root)
    os.environ.update(environment)
    sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
    import pytest

    options = ["-x", "-q", "-p", "mutation_check", "-p", "no:cacheprovider"]
    sys.exit(int(pytest.main([*options, "--hypothesis-seed=0", *tests])))


def _environment(copied: Path, report: Path) -> dict:
    path = [copied.parent, ROOT / "scripts" / "cpu_stand_ins", ROOT / "scripts"]
    return {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_MXFP8_EMULATION": "1",
        "SGLANG_TEST_MAX_RETRY": "0",
        "OMP_NUM_THREADS": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(copied.parent / "hypothesis"),
        COPY: str(copied),
        REPORT: str(report),
        PACKAGE: copied.name,
    }


def _result(exitcode: int, output: Path, report: Path, seconds: float) -> Result:
    """Only a test that ran and failed kills: a broken import proves nothing."""
    printed = output.read_text()[-800:] if output.exists() else ""
    if not report.exists():
        return Result("error", f"pytest ended with {exitcode}: {printed}", seconds)
    told = json.loads(report.read_text())
    if told["imported_elsewhere"]:
        detail = f"the tests import {told['imported_elsewhere']}, not the copy"
        return Result("error", detail, seconds)
    if exitcode == 1 and told["failed"]:
        return Result("killed", told["failed"], seconds, told["why"])
    if exitcode == 0 and told["passed"]:
        return Result("survived", f"{told['passed']} tests passed", seconds)
    return Result("error", f"pytest ended with {exitcode}: {printed}", seconds)


class Told:
    """What the plugin, in the process that runs the tests, has seen."""

    passed, failed, why = 0, None, ""


def pytest_runtest_logreport(report) -> None:
    """Part of the plugin: count what passes, keep the first test that fails."""
    if report.failed and report.when == "call" and Told.failed is None:
        Told.failed = report.nodeid
        # The first of a chain: sglang's test class raises another one after it.
        chain = getattr(report.longrepr, "chain", [(None, None, None)])
        crash = chain[0][1]
        Told.why = (crash.message if crash else str(report.longrepr)).split("\n")[0]
    Told.passed += report.passed and report.when == "call"


def pytest_sessionfinish() -> None:
    """Part of the plugin: write the report, and where the tests' package came from."""
    if REPORT not in os.environ:
        return
    package, copied = os.environ[PACKAGE], os.environ[COPY]
    spec = importlib.util.find_spec(package)
    origins = [spec.origin] + [
        module.__file__
        for name, module in list(sys.modules.items())
        if name.startswith(f"{package}.") and getattr(module, "__file__", None)
    ]
    elsewhere = [o for o in origins if not o.startswith(copied + os.sep)]
    told = {
        "passed": Told.passed,
        "failed": Told.failed,
        "why": Told.why,
        "imported_elsewhere": elsewhere[:1],
    }
    Path(os.environ[REPORT]).write_text(json.dumps(told))


def check(
    package: Path, mutation: Optional[Mutation], tests: Iterable[str], timeout: float
) -> Result:
    """Run the tests against a copy of `package` with the mutation, or without one."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as directory:
        copied = Path(directory).resolve() / package.name
        copy_package(package, copied.parent)
        if mutation is not None:
            apply(mutation, copied)
        return run_tests(copied, tests, timeout)


def selections(mutations: Iterable[Mutation]) -> List[Tuple[str, ...]]:
    """The mutations' tests, each once; a file that runs whole covers its parts."""
    found = dict.fromkeys(mutation.tests for mutation in mutations)
    whole = {tests[0] for tests in found if len(tests) == 1}
    return [tests for tests in found if len(tests) == 1 or tests[0] not in whole]


def check_all(
    package: Path, mutations: List[Mutation], timeout: float, jobs: int = 1
) -> Iterator[Tuple[str, Result]]:
    """First the unchanged code, which all tests must pass; then each mutation."""
    unmutated, passed = selections(mutations), True
    with ThreadPoolExecutor(jobs) as pool:
        names = [f"unmutated: {' '.join(tests)}" for tests in unmutated]
        run = lambda tests: check(package, None, tests, timeout)
        for name, result in zip(names, pool.map(run, unmutated)):
            passed = passed and is_good(name, result)
            yield name, result
        run = lambda m: check(package, m, m.tests, timeout)
        mutations = mutations if passed else []
        for mutation, result in zip(mutations, pool.map(run, mutations)):
            yield mutation.name, result


def is_good(name: str, result: Result) -> bool:
    wanted = "survived" if name.startswith("unmutated: ") else "killed"
    return result.status == wanted


def markdown(
    mutations: List[Mutation], results: List[Tuple[str, Result]], arguments: List[str]
) -> str:
    """The result as a page: what was broken, and which test noticed."""
    by_name = dict(results)
    rows = [
        f"| {m.name} | {m.breaks} | {Path(m.file).name} | {_verdict(by_name[m.name])} |"
        for m in mutations
        if m.name in by_name
    ]
    killed = sum(r.status == "killed" for _, r in results)
    seconds = sum(result.seconds for _, result in results)
    options = " ".join([*arguments, "--output FILE"])
    return "\n".join(
        [
            "# Mutations of the MXFP8 code",
            "",
            f"Command: `python scripts/mutation_check.py {options}`, {datetime.date.today()}",
            "",
            "Each mutation breaks one place of a copy of the installed sglang; the tests "
            "then run against the copy, on a CPU with emulated kernels. All of them pass "
            "unmutated. A mutation is killed when a test that ran fails; a broken import "
            "or a hang does not count. The test is the first that failed: pytest stops "
            "there.",
            "",
            f"{killed} of {len(rows)} killed, in {seconds / 60:.0f} minutes.",
            "",
            "| mutation | what is wrong then | file | killed by |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _without_output(arguments: List[str]) -> List[str]:
    """The arguments but --output: where the page lies says nothing about it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--output")
    return parser.parse_known_args(arguments)[1]


def _verdict(result: Result) -> str:
    if result.status != "killed":
        return f"**{result.status}**"
    return f"`{result.detail.removeprefix(f'{TESTS}/')}`"


def installed_package() -> Path:
    """The sglang that the tests would import, not imported."""
    return Path(importlib.util.find_spec("sglang").origin).parent


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", metavar="NAME", help="only this one")
    parser.add_argument("--output", type=Path, help="write the result as Markdown")
    parser.add_argument(
        "--timeout", type=float, default=300, help="of one run, seconds"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--list", action="store_true", help="print the names and exit")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    unknown = set(options.only or ()) - {m.name for m in MUTATIONS}
    if unknown:
        parser.error(f"no mutation is called {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTATIONS if not options.only or m.name in options.only]
    if options.list:
        print("\n".join(m.name for m in chosen))
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it as it is imported
    results = _run(chosen, options.timeout, options.jobs)
    if options.output:
        options.output.write_text(markdown(chosen, results, _without_output(arguments)))
    bad = [name for name, result in results if not is_good(name, result)]
    print(
        f"{len(chosen)} mutations, {'bad: ' + ', '.join(bad) if bad else 'all killed'}"
    )
    return 1 if bad else 0


def _run(
    mutations: List[Mutation], timeout: float, jobs: int
) -> List[Tuple[str, Result]]:
    total, results = len(selections(mutations)) + len(mutations), []
    with tempfile.TemporaryDirectory(prefix="mutation-") as directory:
        # Whatever is installed meanwhile, all runs see the same code.
        installed = installed_package()
        package = Path(directory) / installed.name
        shutil.copytree(installed, package)
        for mutation in mutations:
            mutated(mutation, (package / mutation.file).read_text())
        for name, result in check_all(package, mutations, timeout, jobs):
            results.append((name, result))
            print(
                f"[{len(results)}/{total}] {name}: {result.status} in "
                f"{result.seconds:.0f} s ({result.detail}) {result.why}",
                flush=True,
            )
    return results


if __name__ == "__main__":
    sys.exit(main())
