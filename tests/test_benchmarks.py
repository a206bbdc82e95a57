"""The benchmarks run, agree with the reference before they time, and refuse what disagrees."""

from __future__ import annotations

import multiprocessing.pool
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import sleep
from types import ModuleType

import pytest
import torch

pytest.importorskip("benchmarks", reason="the benchmarks are not part of the package")

from benchmarks import gpu, pages, peers, rivals, step, zoo
from benchmarks.cases import Case, Job
from benchmarks.measure import interleave
from benchmarks.tables import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")


TINY = Case(64, 16, 1, 2, "silu", 0.25)


def table_on_the_page(module: ModuleType) -> str:
    text: str = module.PAGE.read_text(encoding="utf-8")
    return text.split(module.BEGIN)[1].split(module.END)[0].strip()


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_every_rival_computes_the_same_step(outputs: int, activation: str) -> None:
    job = Job(replace(TINY, outputs=outputs, activation=activation))
    for rival in rivals.rivals(job, with_compiled=False, with_peers=False):
        if rival.penalised:
            loss, gradient = rival.make(job).outcome()
            assert job.error(loss, gradient) < 1e-5, rival.name


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize(("outputs", "columns"), [(1, 3), (2, 5), (4, 1)])
def test_share_of_violations_is_as_asked(share: float, outputs: int, columns: int) -> None:
    job = Job(Case(200, 8, outputs, columns, "relu", share))
    assert job.share == pytest.approx(share, abs=0.02)


def test_a_rival_that_disagrees_gets_no_ratio() -> None:
    # The sum of outputs lets violations of several outputs cancel.
    wrong = rivals.Rival("wrong", rivals.sum_of_outputs)
    right = rivals.Rival("right", rivals.double_backward)
    base = rivals.Rival(rivals.PLAIN, rivals.plain, penalised=False)
    case = replace(TINY, outputs=3)
    table = step.run_case(case, "cpu", lambda job: [base, wrong, right], 0.0, with_memory=False)
    rows = {row["rival"]: row for row in table}
    assert rows["wrong"]["note"] == "disagrees with the reference"
    assert "ratio" not in rows["wrong"]
    assert float(str(rows["right"]["ratio"])) > 0
    assert "of_matmul_rate" not in rows["wrong"]


def test_command_appends_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SECONDS_PER_CASE", 0.0)
    monkeypatch.setattr(step, "matmul_flops", lambda *_: 1e12)
    path = tmp_path / "step.csv"
    words = "--rows 64 --width 16 --outputs 1 --columns 1 --activation relu --share 0"
    for _ in range(2):
        step.main([*words.split(), "--no-compiled", "--no-peers", "--csv", str(path)])
    rows = read_rows(path)
    names = [row["rival"] for row in rows]
    assert names.count(rivals.PLAIN) == 2
    assert names.count("monokernel torch") == 2
    assert {row["torch"] for row in rows} == {torch.__version__}


def test_timings_take_turns() -> None:
    order: list[str] = []
    steps = {name: (lambda name=name: (order.append(name), sleep(0.01))) for name in "abc"}
    times, _ = interleave(steps, 0.0, lambda: None)
    assert len({len(t) for t in times.values()}) == 1
    assert len(times["a"]) >= 5
    assert order[::3] == order[1::3] == order[2::3]  # each three times in a row, the third is timed
    rounds = [tuple(order[i : i + 9 : 3]) for i in range(0, len(order), 9)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1


def test_accuracy_page_shows_what_was_measured() -> None:
    pytest.importorskip("sklearn")
    from benchmarks import accuracy

    rows = read_rows(accuracy.RESULTS)
    assert table_on_the_page(accuracy) == accuracy.table(rows)


@pytest.mark.parametrize(
    "method",
    ["network, penalty by monokernel", "monokernel.sklearn, guarantee", "HistGradientBoosting"],
)
def test_accuracy_of_one_seed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    from benchmarks import accuracy

    monkeypatch.setattr(accuracy, "STEPS", 100)
    row = accuracy.measure("diabetes", method, seed=0)
    assert 30 < float(row["loss"]) < 90
    assert float(row["violation_rate"]) < 0.2
    assert bool(row["held_out_rate"]) == ("network" in method)


def test_peers_of_certify_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("scipy")
    monkeypatch.setattr(peers, "TRAINING", 30)
    monkeypatch.setattr(peers, "EXACT", (("relu", (4, 9, 1), 1),))
    monkeypatch.setattr(peers, "BOUNDS", (("relu", (3, 5, 1)),))
    path = tmp_path / "peers.csv"
    for part in ("exact", "bounds", "false"):
        peers.main(["--only", part, "--csv", str(path)])
    rows = read_rows(path)
    exact = [row for row in rows if row["what"] == "exact"]
    assert {row["result"] for row in exact if "below" in row["method"]} == {"proved"}
    assert {row["result"] for row in exact if "above" in row["method"]} == {"violated"}
    least = [float(row["value"]) for row in exact if row["method"] == "HiGHS"]
    below = [float(row["value"]) for row in exact if "below" in row["method"]]
    assert below == pytest.approx([v - peers.OFF for v in least], abs=1e-5)
    widths = [row for row in rows if row["what"].startswith("bounds")]
    assert {row["result"] for row in widths} == {"0 points outside"}
    ours = [row for row in rows if row["what"] == "one slope in a box" and "mono" in row["method"]]
    assert ours
    assert all(row["result"].startswith("holds") for row in ours)
    assert "monokernel, linear bounds" in capsys.readouterr().out


def test_scaling_draws_every_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import scaling

    small = [replace(axis, base=replace(axis.base, rows=64, width=16)) for axis in scaling.AXES]
    small = [replace(axis, values=axis.values[:1]) for axis in small]
    monkeypatch.setattr(scaling, "AXES", small)
    monkeypatch.setattr(scaling, "SECONDS", 0.0)
    monkeypatch.setattr(step, "matmul_flops", lambda *_: 1e12)
    scaling.main(["--csv", str(tmp_path / "s.csv"), "--figures", str(tmp_path)])
    assert (tmp_path / "scaling.svg").read_text().startswith("<?xml")


def test_grid_draws_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import grid

    cases = [Case(16, 16, 1, 4, "silu", 0.05), Case(16, 16, 1, 1, "softplus", 1.0)]
    monkeypatch.setattr(grid, "CASES", cases)
    monkeypatch.setattr(grid, "SECONDS", 0.0)
    monkeypatch.setattr(step, "matmul_flops", lambda *_: 1e12)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{grid.BEGIN}\nold\n{grid.END}\nafter\n")
    grid.main(["--csv", str(tmp_path / "g.csv"), "--figures", str(tmp_path), "--page", str(page)])
    assert "| 1 | 4 | silu | 16 | 16 |" in page.read_text()
    assert "old" not in page.read_text()
    rows = read_rows(tmp_path / "g.csv")
    assert [row["rival"] for row in rows[::3]] == ["PyTorch plain step"] * 2
    assert not any("disagrees" in row["note"] for row in rows)
    assert (tmp_path / "grid.svg").read_text().startswith("<?xml")


@pytest.mark.skipif(not pages.RESULTS.exists(), reason="nothing measured yet")
def test_benchmarks_page_shows_what_was_measured() -> None:
    assert table_on_the_page(pages) == pages.tables(read_rows(pages.RESULTS))


def test_performance_page_shows_the_grid() -> None:
    from benchmarks import grid

    assert table_on_the_page(grid) == grid.table(read_rows(grid.RESULTS))


def test_the_page_prefers_undisturbed_runs() -> None:
    case = dict.fromkeys(pages.CASE, "1")
    others = {"1": "0.30", "2": "0.01", "3": "0.02", "4": "0.40"}
    rows = [{**case, "rival": "a", "date": date, "others": o} for date, o in others.items()]
    (found,) = pages.chosen(rows).values()
    assert found["a"]["date"] == "3"


# --- the zoo --------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", ["tabular ResNet", "DCN-v2", "squeezed", "own forward"])
def test_zoo_row_of_a_case(name: str, outputs: int) -> None:
    row = zoo.measure(zoo.case_of(name, 200, outputs, 2, width=8, share=0.25), 0.0)
    assert row.keys() <= set(zoo.FIELDS)
    assert float(row["error"]) < 1e-5
    assert float(row["share"]) == pytest.approx(0.25, abs=0.02)
    assert float(row["ratio"]) > 0


def test_zoo_times_what_draws_masks_without_comparing_it() -> None:
    (name,) = zoo.ACTIVE
    row = zoo.measure(zoo.case_of(name, 64, 1, 1, width=8), 0.0)
    assert "error" not in row
    assert float(row["ratio"]) > 0


def test_zoo_gives_no_ratio_to_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "penalised_loss", lambda job, *_: 1.01 * rivals.plain_loss(job))
    row = zoo.measure(zoo.case_of("PReLU", 64, 1, 1, width=8), 0.0)
    assert row["note"] == "disagrees with double backward"
    assert "ratio" not in row


def test_zoo_rows_are_added_and_make_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, page = tmp_path / "zoo.csv", tmp_path / "page.md"
    page.write_text(f"before\n{zoo.BEGIN}\nold\n{zoo.END}\nafter\n", encoding="utf-8")
    asked = ["--networks", "PReLU", "--rows", "256", "--outputs", "1", "--columns", "1"]
    for _ in range(2):
        zoo.main([*asked, "--width", "8", "--csv", str(file), "--page", str(page)])
    assert len(read_rows(file)) == 2
    newest = read_rows(file)[1]
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["before", zoo.BEGIN]
    assert lines[-2:] == [zoo.END, "after"]
    cells = [cell.strip() for cell in lines[5].strip("|").split("|")]
    assert cells[:2] == ["PReLU", newest["backend"]]
    assert [cell.strip("~") for cell in cells[2:] if cell] == [newest["ratio"]]
    assert "PReLU" in capsys.readouterr().out


@pytest.mark.skipif(not zoo.RESULTS.exists(), reason="nothing measured yet")
def test_performance_page_shows_the_zoo() -> None:
    assert table_on_the_page(zoo) == zoo.table(read_rows(zoo.RESULTS))


# --- the benchmark for a GPU, as far as it goes without one ---------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands for what has been compiled: a step that compiles adds to it."""
    found: list[int] = []
    monkeypatch.setattr(gpu, "compilations", lambda: len(found))
    return found


def _compiles_at(turns: tuple[int, ...], compiled: list[int], taken: list[int]) -> rivals.Rival:
    """A rival that compiles at these of its turns."""

    def run() -> None:
        taken.append(len(taken) + 1)
        if taken[-1] in turns:
            compiled.append(taken[-1])

    def outcome() -> tuple[float, torch.Tensor]:
        run()
        return 0.0, torch.zeros(1)

    return rivals.Rival("late", lambda job: rivals.Step(run, outcome), penalised=False)


def test_gpu_rivals_settle_before_they_are_timed(compiled: list[int]) -> None:
    """A compiler may look again at a later step: at the second, and after one that was quiet."""
    taken: list[int] = []
    step, row = gpu.admit(None, _compiles_at((1, 2, 4), compiled, taken))  # type: ignore[arg-type]
    assert step is not None
    assert not row["note"]
    assert compiled == [1, 2, 4]
    assert taken[-1] == 6


def test_gpu_rival_that_never_settles_is_not_timed(compiled: list[int]) -> None:
    step, row = gpu.admit(None, _compiles_at(tuple(range(1000)), compiled, []))  # type: ignore[arg-type]
    assert step is None
    assert "compiled again" in str(row["note"])


def test_gpu_tells_of_what_compiles_while_timed(compiled: list[int]) -> None:
    ready = gpu.prepare(next(gpu.small_cases()), "cpu", thorough=False, jax=False)
    late = ready.steps["monokernel"].run

    def run() -> None:
        late()
        compiled.append(0)

    ready.steps["monokernel"] = replace(ready.steps["monokernel"], run=run)
    notes = {str(row["rival"]): row["note"] for row in gpu.measure(ready, 0.0)}
    assert set(notes.values()) == {"something was compiled meanwhile"}


def test_gpu_compilations_are_seen() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    f = torch.compile(twice, backend="eager", dynamic=False)
    seen = [gpu.compilations()]
    for n in (3, 3, 4, 4):
        f(torch.ones(n))
        seen.append(gpu.compilations())
    assert seen[0] < seen[1] == seen[2] < seen[3] == seen[4]
    pytest.importorskip("triton")
    from triton import knobs

    gpu.listen_to_triton()
    knobs.runtime.jit_post_compile_hook(key="", repr="", fn=None)
    assert gpu.compilations() == seen[4] + 1


def test_gpu_leaves_jax_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(gpu.small_cases())
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(gpu, "compile_ahead", lambda *_: None)
    monkeypatch.setattr(gpu, "small_cases", lambda: [case])
    asked: list[tuple[object, ...]] = []

    class Child:
        pool = multiprocessing.pool.ThreadPool(1)

        def prepare(self, patience: float, *case: object) -> None:
            asked.append(case)
            raise RuntimeError("enough")

    monkeypatch.setattr(gpu, "Child", Child)
    found = []
    for words in ("--device cpu", "--device cpu --no-jax"):
        assert gpu.main(words.split()) == 0
        _, _, thorough, jax = asked[-1]
        job = Job(case)
        found.append([c.name for c in gpu.contenders(job, False, thorough, jax)])
    assert found[0] == [*found[1], "JAX jit"]


def test_gpu_rivals_that_compile_too_long_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[object, ...]] = []

    class Child:
        pool = multiprocessing.pool.ThreadPool(1)

        def prepare(self, patience: float, *case: object) -> None:
            asked.append(case[2:])
            if len(asked) == 1:
                raise multiprocessing.TimeoutError

        def measure(self, patience: float, seconds: float) -> list[gpu.Row]:
            return [{"rival": rivals.PLAIN, "p50_ms": "1.5", "share": "0.05", "note": ""}]

    monkeypatch.setattr(gpu, "Child", Child)
    monkeypatch.setattr(gpu, "compile_ahead", lambda *_: None)
    monkeypatch.setattr(gpu, "small_cases", lambda: [Case(64, 16, 1, 1, "silu", 0.05)])
    assert gpu.main(["--device", "cpu"]) == 0
    assert asked == [(True, True), (False, False)]
    assert "took too long" in capsys.readouterr().out


def test_gpu_rows_of_a_case() -> None:
    case = next(gpu.small_cases())
    rows = gpu.measure(gpu.prepare(case, "cpu", thorough=False, jax=False), 0.0)
    names = [row["rival"] for row in rows]
    assert names == [rivals.PLAIN, "monokernel", "sum of outputs"]
    assert all(float(str(row["p50_ms"])) > 0 for row in rows)
    assert not any(row["note"] for row in rows)
    assert all(row.keys() <= set(gpu.FIELDS) for row in rows)


def test_gpu_precisions_agree_with_float64() -> None:
    """In half precision on the CPU; what is summed over the rows is summed in float32."""
    for precision in ("bf16", "fp16"):
        job = Job(replace(TINY, precision=precision))
        assert job.net[0].weight.dtype == job.x2.dtype != torch.float32
        for rival in gpu.contenders(job, gpu=False, thorough=False, jax=False):
            if rival.penalised:
                loss, gradient = rival.make(job).outcome()
                assert job.error(loss, gradient) < gpu.TOLERANCE[precision], rival.name


def test_another_tests_package_on_the_path_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """Some distributions install their tests so: a folder without __init__.py would lose to it."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").touch()
    subprocess.run(
        [sys.executable, "-c", "import tests.problems"],
        check=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )


# --- the first run on a card, under the interpreter -----------------------------------------------


@pytest.fixture
def two_trials(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("triton")
    from benchmarks import first_light

    if not first_light.interpreting():
        pytest.skip("runs under TRITON_INTERPRET=1")
    few = [first_light.Trial(path, "fp16", 64, k=4, rows=(1, 70)) for path in first_light.PATHS]
    monkeypatch.setattr(first_light, "trials", lambda: iter(few))
    return first_light


@pytest.mark.parametrize("processes", [1, 2])
def test_first_light_smoke(
    processes: int, two_trials: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["smoke", "--device", "cpu", "--processes", str(processes)]
    assert two_trials.main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = [["ok", path] for path in ("whole", "narrow", "layered") for _ in range(2)]
    assert [line.split()[:2] for line in lines] == wanted


def test_first_light_tells_a_wrong_kernel(
    two_trials: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = two_trials.PATHS["whole"]

    class Wrong(ModuleType):
        refuses, forward = whole.refuses, whole.forward

        def backward(self, *asked: object) -> list[torch.Tensor | None]:
            return [None if g is None else 1.1 * g for g in whole.backward(*asked)]

    trial = two_trials.Trial("whole", "fp16", 64, hinge=None, rows=(1, 70))
    monkeypatch.setattr(two_trials, "trials", lambda: iter([trial]))
    monkeypatch.setitem(two_trials.PATHS, "whole", Wrong("wrong"))
    assert two_trials.main(["smoke", "--device", "cpu"]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["BAD", "BAD"]


@pytest.mark.parametrize(
    ("part", "told"), [("stress", "0 of 1 runs differ"), ("one", "0 of 11 tensors not finite")]
)
def test_first_light_on_tiny_sizes(
    part: str,
    told: str,
    two_trials: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for todo in ("STRESSED", "ONE"):
        monkeypatch.setattr(two_trials, todo, getattr(two_trials, todo)[::5][:2])
    assert two_trials.main([part, "--device", "cpu", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.endswith(told) for line in lines)


def test_first_light_needs_a_card_for_times(two_trials: ModuleType) -> None:
    assert two_trials.main(["sweep", "--device", "cpu"]) == 2
    if not torch.cuda.is_available():
        assert two_trials.main(["smoke"]) == 2
