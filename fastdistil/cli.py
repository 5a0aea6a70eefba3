"""The command line: arguments -> a recipe or options -> one call, and its result printed."""

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import rich.console
import typer

from fastdistil import __version__
from fastdistil.console import EvaluateBar, PrepareBar, prepare_summary
from fastdistil.errors import EXIT_CODES, DiskFull, FastdistilError, RankLost, UserError, printable, translated
from fastdistil.signals import stopping_as_interrupts
from fastdistil.streams import lasting_output

app = typer.Typer(
    name="fastdistil",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Distils a language model (the teacher) into a smaller one (the student).",
    epilog="Exit codes: " + "; ".join(f"{code}: {meaning}" for code, meaning in EXIT_CODES.items()),
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Recipe fields to change, e.g. optim.lr=1e-4", show_default=False),
]
Resume = Annotated[
    str | None,
    typer.Option(metavar="auto|PATH", help="Continue the newest run of this recipe, or the run or checkpoint at PATH."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Resolve everything, print recipe and estimates, start nothing.")]
Ranks = Annotated[int | None, typer.Option("--np", metavar="N", help="Train with N ranks: processes on this machine.")]
Hosts = Annotated[str | None, typer.Option(metavar="a:8,b:8", help="Train with 8 ranks on each of hosts a and b, over ssh.")]
ElasticRanks = Annotated[
    str | None,
    typer.Option("--elastic", metavar="MIN:MAX", help="Start MAX ranks; go on without lost ones while there are MIN of them."),
]
GrowAfter = Annotated[
    float, typer.Option(min=0, help="--elastic on one machine: seconds until a lost rank's place is tried again.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DocumentsAre = Annotated[str, typer.Option(metavar="file|paragraph|line", help="What a document is in a .txt file.")]
TextField = Annotated[str, typer.Option(help="Field of JSON and parquet that holds the text.")]
ReadAs = Annotated[
    str | None, typer.Option("--as", metavar="txt|jsonl|parquet", help="What all files hold, whatever their names.")
]
StripGutenberg = Annotated[bool, typer.Option(help="Remove Project Gutenberg headers and footers.")]
SpecialTokensInText = Annotated[
    bool,
    typer.Option(
        "--special-tokens-in-text",
        help="Parse special tokens that the text spells out, such as [MASK]; default: they are text.",
    ),
]
Strip = Annotated[
    bool | None,
    typer.Option(
        "--strip/--no-strip",
        help="Take white space off both ends of documents; default: for masked models (tokenizers with a mask token) only.",
        show_default=False,
    ),
]
MaxUnknownShare = Annotated[
    float, typer.Option(help="Stop if more of all tokens than this are unknown to the tokenizer; 1: never.")
]
PrepareBos = Annotated[
    str,
    typer.Option(
        metavar="auto|yes|no",
        help="[CLS] or BOS in front of each piece; auto: with --special-tokens, BOS only if the tokenizer's own call puts it.",
    ),
]
EvaluateBos = Annotated[
    str,
    typer.Option(
        metavar="auto|yes|no", help="Causal models, raw text: BOS before each document; auto: as the tokenizer's own call does."
    ),
]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name or the path of a .yaml file.")]


def main() -> NoReturn:
    """Entry point: every FastdistilError becomes one line on standard error and its exit code."""
    if "FASTDISTIL_LAUNCHER_PID" in os.environ:
        from fastdistil.launch.rank_process import tie_to_launcher

        tie_to_launcher(os.environ)
    try:
        with lasting_output():
            code = _exit_code()
    except DiskFull as error:
        code = _fail(str(error), error.exit_code)
    sys.exit(code)


def _exit_code() -> int:
    """Run the command; what goes wrong is said on standard error."""
    try:
        with stopping_as_interrupts():
            code = app(standalone_mode=False) or 0
        if code == 130:  # typer makes that of KeyboardInterrupt; older ones raise Abort
            raise typer.Abort
        return int(code)
    except FastdistilError as error:
        return _fail(str(error), error.exit_code)
    except typer.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # typer takes the end of any file for the end of what is typed
            raise abort.__cause__ from None
        return _fail("interrupted; what was saved before is whole", 130)
    except Exception as error:
        # Wrong arguments: click's exceptions, or typer's own copies of them, which are not public.
        show = getattr(error, "show", None)
        if not callable(show):
            raise
        show()
        return 2


def _fail(message: str, code: int) -> int:
    print(f"fastdistil: {' '.join(message.split())}", file=sys.stderr)
    if code == RankLost.exit_code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # other threads may hang in a collective, and would be waited for
    return code


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"fastdistil {__version__}")
        raise typer.Exit


@app.command(
    "pretrain",
    help="Train a model without a teacher, with the same loop: a teacher for those who cannot download one.",
    epilog="Example: fastdistil pretrain bert-small data.train=corpus/ loop.epochs=2",
)
@app.command(
    "train",
    help="Distil a teacher into a student. `fastdistil train demo` needs nothing and takes minutes.",
    epilog="Example: fastdistil train distilbert teacher.path=bert-base-uncased data.train=corpus/ --np 4",
)
def _train_or_pretrain(
    context: typer.Context,
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Resume = None,
    dry_run: DryRun = False,
    np: Ranks = None,
    hosts: Hosts = None,
    elastic: ElasticRanks = None,
    grow_after: GrowAfter = 60.0,
) -> None:
    from fastdistil.start import RankOptions, start

    options = RankOptions(np, hosts, elastic, grow_after)
    start(str(context.command.name), recipe, overrides or [], resume, options, dry_run=dry_run)


Options = TypeVar("Options")


def _filled(kind: type[Options], parameters: Mapping[str, Any]) -> Options:
    """Make the dataclass of a command's options; each of its fields is a parameter of the command with the same name."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: parameters[name] for name in names})


@app.command(epilog="Example: fastdistil prepare books/ --tokenizer bert-base-uncased --out corpus --strip-gutenberg")
def prepare(
    inputs: Annotated[list[str], typer.Argument(help="Text, JSON and parquet files, directories, globs.")],
    tokenizer: Annotated[str, typer.Option(help="Hub id or directory.")],
    out: Annotated[Path, typer.Option(help="Directory to write; an interrupted one is continued.")],
    max_length: Annotated[int, typer.Option(help="Tokens of the longest sequence, special ones included.")] = 512,
    documents: DocumentsAre = "file",
    text_field: TextField = "text",
    read_as: ReadAs = None,
    strip_gutenberg: StripGutenberg = False,
    strip: Strip = None,
    special_tokens: Annotated[bool, typer.Option(help="Put the tokenizer's special tokens around each piece.")] = True,
    special_tokens_in_text: SpecialTokensInText = False,
    bos: PrepareBos = "auto",
    min_tokens: Annotated[int, typer.Option(help="Drop shorter pieces (the Hugging Face example: 12).")] = 0,
    max_unknown: Annotated[float, typer.Option(help="Drop pieces with this share of unknown tokens (the example: 0.5).")] = 1.0,
    max_unknown_share: MaxUnknownShare = 0.2,
    max_bad_fraction: Annotated[float, typer.Option(help="Stop if more records than this are unreadable.")] = 0.001,
    shard_tokens: Annotated[int, typer.Option(help="Tokens of a shard.")] = 64 * 2**20,
    workers: Annotated[int | None, typer.Option(help="Processes; default: all cores.")] = None,
) -> None:
    """Turn text into token shards."""
    parameters = dict(locals())
    from fastdistil.data.prepare import PrepareOptions
    from fastdistil.data.prepare import prepare as run

    options = _filled(PrepareOptions, parameters)
    with PrepareBar() as bar:
        manifest = run(inputs, out, options, bar)
    print(prepare_summary(out, manifest, gutenberg=strip_gutenberg))


@app.command(epilog="Example: fastdistil evaluate runs/distilbert-1/student wikitext/test.txt --positions 2000")
def evaluate(
    model: Annotated[str, typer.Argument(help="Hub id or directory of a masked or causal language model.")],
    corpora: Annotated[list[str], typer.Argument(metavar="CORPUS...", help="Prepared directories or text files.")],
    positions: Annotated[
        str, typer.Option(metavar="N|all", help="Token positions for pseudo-perplexity; 0: leave it out.")
    ] = "2000",
    seed: Annotated[int, typer.Option(help="Of masks and sampled positions.")] = 0,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of the longest sequence (default 512), or of a causal model's window (1024).")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Causal models: tokens the window moves by; default: half of it.")] = None,
    documents: DocumentsAre = "file",
    text_field: TextField = "text",
    read_as: ReadAs = None,
    strip_gutenberg: StripGutenberg = False,
    strip: Strip = None,
    special_tokens_in_text: SpecialTokensInText = False,
    max_unknown_share: MaxUnknownShare = 0.2,
    bos: EvaluateBos = "auto",
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch.")] = 8192,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda")] = "auto",
    precision: Annotated[str, typer.Option(metavar="auto|fp32|bf16|fp16")] = "auto",
    json: Json = False,
) -> None:
    """Loss, perplexity and pseudo-perplexity of a model on text."""
    parameters = dict(locals())
    from fastdistil import evaluate as evaluation

    if positions != "all" and not (positions.isdecimal() and len(positions) <= 15):
        raise UserError(f"--positions is a number or all, got {positions!r}")
    parameters["positions"] = "all" if positions == "all" else int(positions)
    options = _filled(evaluation.EvaluateOptions, parameters)
    with EvaluateBar() as bar:
        report = evaluation.evaluate(model, corpora, options, bar)
    if json:
        print(report.to_json())
    else:
        evaluation.print_report(report)


@app.command(name="cache-teacher", epilog="Example: fastdistil cache-teacher distilbert data.train=corpus/ teacher.top_k=64")
def cache_teacher(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write, or to complete; default: one inside data.train.")
    ] = None,
) -> None:
    """Write the teacher's likeliest tokens for all that a recipe trains on, so that training needs no teacher."""
    from fastdistil.recipe import load_recipe
    from fastdistil.training.cache_teacher import cache_teacher as run

    with EvaluateBar("caching") as bar, translated("caching the teacher", out):
        written = run(load_recipe(recipe, overrides or ()), out, bar)
    print(
        f"{written.shards} shards of {written.epochs} epochs, {written.size / 2**20:,.0f} MiB ({written.made} made now); "
        f"train from it with teacher.cache={written.directory} objective.a_cos=0"
    )


@app.command(epilog="Example: fastdistil cluster distilbert --for slurm --nodes 4 --time 8h data.train=corpus/ --out job.sh")
def cluster(
    recipe: RecipeName,
    kind: Annotated[str, typer.Option("--for", metavar="slurm|mpijob|skypilot|dstack", help="What runs the cluster.")],
    nodes: Annotated[int, typer.Option(help="Machines.")],
    overrides: Overrides = None,
    gpus: Annotated[
        str | None,
        typer.Option(metavar="N|TYPE:N", help="Of each node: 8, H100:8, 0 for none; default: 8, or 0 with device=cpu."),
    ] = None,
    image: Annotated[str | None, typer.Option(help="Container image with fastdistil in it (mpijob needs one).")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Kept at /workspace: a volume claim (mpijob), bucket (skypilot), volume (dstack).")
    ] = None,
    time: Annotated[str | None, typer.Option(metavar="90m|8h|2d", help="Limit of the job.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None,
) -> None:
    """Write the one file that sets a cluster up for a recipe and starts the run there."""
    from datetime import UTC, datetime

    from fastdistil.launch.cluster import KINDS, Cluster, cluster_file, local_paths
    from fastdistil.recipe import load_recipe

    chosen = next((supported for supported in KINDS if supported == kind), None)
    if chosen is None:
        raise UserError(f"--for {kind}: wanted one of {', '.join(KINDS)}")
    if recipe == "demo":
        raise UserError("the demo is for one machine; give a recipe on prepared data, e.g. distilbert data.train=corpus/")
    loaded = load_recipe(recipe, overrides or ())
    if gpus is None:
        gpus = "0" if loaded.device == "cpu" else "8"
    elif loaded.device == "cpu" and gpus.rpartition(":")[2] != "0":
        raise UserError(f"device=cpu uses none of the GPUs that --gpus {gpus} asks for; leave one of them out")
    elif loaded.device.startswith("cuda") and gpus == "0":
        raise UserError(f"device={loaded.device} needs GPUs, and --gpus 0 asks for none; leave one of them out")
    text = cluster_file(
        chosen,
        Cluster(
            command="train" if loaded.teacher is not None else "pretrain",
            recipe=recipe,
            overrides=overrides or (),
            run_name=loaded.name or f"{Path(recipe).stem}-{datetime.now(UTC):%Y%m%d-%H%M%S}",
            nodes=nodes,
            gpus=gpus,
            image=image,
            storage=storage,
            time=time,
        ),
    )
    if chosen != "slurm":  # there all nodes see the same files
        for key, path in local_paths(loaded):
            warning = f"{key}={path} is a path of this machine; the nodes need it too, e.g. on --storage, below /workspace"
            print(f"fastdistil: {warning}", file=sys.stderr)
    if out is None:
        print(text, end="")
        return
    with translated("writing the cluster's file", out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(printable(text), encoding="utf-8")
    print(f"{out}: its first lines say how to start it")


@app.command(epilog="Example: fastdistil pause runs/distilbert-1")
def pause(run: Annotated[Path, typer.Argument(help="Directory of the run.")]) -> None:
    """Ask a run to drop the window under way, save its last update, evaluate and stop (exit code 75)."""
    from fastdistil.runs import request_pause

    request_pause(run)
    print(f"asked {run} to pause; it says how to continue it when it has saved")


@app.command()
def doctor(json: Json = False) -> None:
    """Versions, devices, what is available, what is not and how to get it."""
    from fastdistil.install import doctor as doctors

    findings = doctors.examine()
    if json:
        print(doctors.as_json(findings))
    else:
        doctors.render(findings, rich.console.Console())
    raise typer.Exit(doctors.exit_code(findings))


@app.command(epilog="Example: fastdistil watch runs/distilbert-1, and from elsewhere: ssh -L 8642:localhost:8642 MACHINE")
def watch(
    run: Annotated[Path, typer.Argument(help="Directory of the run; it may appear later.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8642,
    host: Annotated[
        str, typer.Option(metavar="ADDR", help="Another address than this machine's own asks for a token.")
    ] = "127.0.0.1",
) -> None:
    """Show a run's report in a browser while it goes, with progress, health and the last log lines on top."""
    from fastdistil.profiling.report.watch import watch as serve

    serve(run, host, port)


@app.command(
    epilog="Example: fastdistil scale demo --np 1,2 --predict 8,64 --network p3dn; fastdistil scale --table distilbert-2020"
)
def scale(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe's name or the path of a .yaml file.")] = None,
    overrides: Overrides = None,
    np: Annotated[str | None, typer.Option("--np", metavar="1,2,4", help="Rank counts to measure.")] = None,
    hosts: Hosts = None,
    mode: Annotated[str, typer.Option(metavar="weak|strong|both", help="Fixed: the work of a rank, of all, or each.")] = "weak",
    rings: Annotated[str, typer.Option(metavar="1,4", help="world.rings to measure.")] = "1",
    compression: Annotated[str, typer.Option(metavar="none,fp16,int8", help="compression.kind to measure.")] = "none",
    sync: Annotated[str, typer.Option(metavar="delayed,every-micro-batch", help="world.sync to measure.")] = "delayed",
    steps: Annotated[int, typer.Option(min=1, help="Measured updates of a run, after 2 of warm-up.")] = 6,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each point, turn about.")] = 3,
    ceiling: Annotated[bool, typer.Option(help="On one machine: also unconnected runs side by side.")] = True,
    on: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="The network between --hosts, where it is known.")] = None,
    baseline: Annotated[int | None, typer.Option(help="Ranks (--table: row) that the ideal line starts from.")] = None,
    predict: Annotated[str | None, typer.Option(metavar="64,512", help="Rank counts to predict.")] = None,
    network: Annotated[str | None, typer.Option(metavar="p3dn|p4d|h100-400g|FILE", help="Networks to predict for.")] = None,
    table: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="A table of GPUs and minutes instead of runs.")] = None,
    points: Annotated[str | None, typer.Option(metavar="FILE,FILE", help="Earlier scale.json instead of runs.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to write; default: one below runs/.")] = None,
) -> None:
    """Measure how training scales against the linear ideal, say where the rest goes, and predict what was not measured."""
    parameters = {**locals(), "overrides": overrides or ()}
    from fastdistil.studies.scale import ScaleOptions, command

    command(_filled(ScaleOptions, parameters))


@app.command(epilog="Example: fastdistil profile distilbert data.train=corpus/ --steps 50")
def profile(
    recipe: RecipeName,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured updates, after a few of warm-up.")] = 30,
    np: Ranks = None,
    json: Json = False,
) -> None:
    """Run some real updates, say where their time goes, and name the bottleneck and the recipe key that addresses it."""
    from fastdistil.studies.profile import run_profile

    run_profile(recipe, overrides or (), steps=steps, np=np, as_json=json, console=rich.console.Console())


@app.command(epilog="Example: fastdistil compare runs/distilbert-profile-1 runs/distilbert-profile-2 --fail-above 5%")
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run, a profile.json, or a file of pytest --benchmark-json.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Likewise; compared with A.")],
    fail_above: Annotated[
        str | None, typer.Option(metavar="5%", help="Exit with 3 if B is slower than A by more than this, for certain.")
    ] = None,
    anyway: Annotated[bool, typer.Option("--anyway", help="Compare measurements of different work too.")] = False,
    json: Json = False,
) -> None:
    """Compare two measurements, with 95% intervals."""
    from fastdistil.profiling.report.compare import run_compare

    run_compare(a, b, fail_above=fail_above, anyway=anyway, as_json=json, console=rich.console.Console())


@app.command(epilog="Example: fastdistil report runs/distilbert-1 runs/distilbert-2 --out comparison.html")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories; the first is the baseline.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Default: report.html in the run, of several here; of --markdown, --json: printed."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="The figures as Markdown tables.")] = False,
    json: Annotated[bool, typer.Option("--json", help="The figures as JSON.")] = False,
) -> None:
    """Write what runs recorded into one HTML file that needs nothing else: charts, figures, differences."""
    from fastdistil.profiling.report.report import run_report

    run_report(runs, out, markdown=markdown, as_json=json)


if __name__ == "__main__":
    main()
