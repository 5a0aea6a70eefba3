"""The command line: arguments -> a recipe or options -> one call, and its result printed."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn

import rich.console
import typer

from fastdistil import __version__
from fastdistil.console import EvaluateBar, PrepareBar
from fastdistil.errors import EXIT_CODES, DiskFull, FastdistilError, RankLost
from fastdistil.signals import stopping_as_interrupts
from fastdistil.streams import lasting_output

if TYPE_CHECKING:
    from fastdistil.data.corpus import Manifest
    from fastdistil.evaluate import Report

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


class RankOptions(NamedTuple):
    np: int | None
    hosts: str | None
    elastic: str | None
    grow_after_s: float


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
    from fastdistil.errors import UserError
    from fastdistil.recipe import load_recipe
    from fastdistil.training.saving import restore_recipe

    command, options = str(context.command.name), RankOptions(np, hosts, elastic, grow_after)
    if resume is not None and Path(recipe).name == "recipe.yaml":
        restore_recipe(Path(recipe).parent, note=lambda text: print(text, file=sys.stderr))
    loaded = load_recipe(recipe, overrides or ())
    if command == "train" and recipe == "demo":
        _demo(loaded, resume, dry_run, options)
        return
    if command == "train" and loaded.teacher is None:
        raise UserError(f"recipe {recipe} has no teacher; set teacher.path=..., or use `fastdistil pretrain`")
    if command == "pretrain" and loaded.teacher is not None:
        raise UserError(f"recipe {recipe} has a teacher ({loaded.teacher.path}); use `fastdistil train`, or set teacher=null")
    _run(command, loaded, recipe, overrides or [], resume, dry_run, options)


def _demo(recipe: Any, resume: str | None, dry_run: bool, options: RankOptions) -> None:
    from fastdistil.demo import plan_demo, run_demo
    from fastdistil.errors import UserError

    if options.np is not None or options.hosts is not None or options.elastic is not None:
        raise UserError("the demo trains several small models one after another, with one rank; give a recipe to --np")
    if dry_run:
        plan_demo(recipe, rich.console.Console())
    else:
        run_demo(recipe, resume)


def _run(
    command: str, recipe: Any, name: str, overrides: list[str], resume: str | None, dry_run: bool, options: RankOptions
) -> None:
    stem = Path(name).stem if name.endswith((".yaml", ".yml")) else name
    if dry_run:
        from fastdistil.runs import choose_run
        from fastdistil.training.inputs import resolve
        from fastdistil.training.memory_plan import show_plan

        show_plan(resolve(recipe), choose_run(recipe, stem, resume)[0], rich.console.Console())
        return
    if options.np not in (None, 1) or options.hosts is not None or options.elastic is not None:
        sys.exit(_launch(command, recipe, name, overrides, resume, options))  # the launcher has said why
    from fastdistil.distributed.rank_info import find_rank_info
    from fastdistil.train import train as run

    place = find_rank_info(os.environ)
    result = run(recipe, recipe_name=stem, resume=resume, place=place)
    if place is None or place.rank == 0:
        print(
            f"done: {result.updates} updates, {result.tokens_per_second:,.0f} tokens/s; "
            f"the student is in {result.run_dir / 'student'}"
        )


def _launch(command: str, recipe: Any, name: str, overrides: list[str], resume: str | None, options: RankOptions) -> int:
    """Start the ranks: each runs this same command without the options that start ranks. Returns the exit code."""
    from fastdistil.errors import UserError
    from fastdistil.launch.job import Elastic, Job, choose_slots, parse_elastic
    from fastdistil.launch.launcher import launch
    from fastdistil.runs import choose_run, is_run

    elastic, np = None, options.np
    program = [sys.executable, "-m", "fastdistil", command, name]
    first = [*program, *overrides, *(["--resume", resume] if resume else [])]
    if options.elastic is not None:
        min_ranks, max_ranks = parse_elastic(options.elastic)
        np = max_ranks if np is None else np
        if not min_ranks <= np <= max_ranks:
            raise UserError(f"--np {np} is outside --elastic {options.elastic}; leave it out to start with {max_ranks}")
        # The directory is chosen here, so that every start continues the same run.
        stem = Path(name).stem if name.endswith((".yaml", ".yml")) else name
        directory, _ = choose_run(recipe, stem, resume)
        pinned = [*overrides, f"name={json.dumps(directory.name)}", f"runs_dir={json.dumps(str(directory.parent))}"]

        def again() -> tuple[str, ...]:
            # Once there is a run, a rank 0 that does not find it (on another host's own disk) must not begin anew.
            return (*program, *pinned, "--resume", str(directory) if is_run(directory) else "auto")

        first = [*program, *pinned, *(["--resume", resume] if resume else [])]
        elastic = Elastic(
            min_ranks=min_ranks,
            again=again,
            progress=lambda: max((path.name for path in directory.glob("checkpoints/step-*")), default=""),
            grow_after_s=options.grow_after_s,
        )
    slots, ranks = choose_slots(np, options.hosts)
    return launch(Job(command=tuple(first), slots=slots, ranks=ranks, timeout_s=recipe.world.timeout_s, elastic=elastic))


@app.command(epilog="Example: fastdistil prepare books/ --tokenizer bert-base-uncased --out corpus --strip-gutenberg")
def prepare(
    inputs: Annotated[list[str], typer.Argument(help="Text, JSON and parquet files, directories, globs.")],
    tokenizer: Annotated[str, typer.Option(help="Hub id or directory.")],
    out: Annotated[Path, typer.Option(help="Directory to write; an interrupted one is continued.")],
    max_length: Annotated[int, typer.Option(help="Tokens of the longest sequence, special ones included.")] = 512,
    documents: Annotated[str, typer.Option(metavar="file|paragraph|line", help="What a document is in a .txt file.")] = "file",
    text_field: Annotated[str, typer.Option(help="Field of JSON and parquet that holds the text.")] = "text",
    read_as: Annotated[
        str | None, typer.Option("--as", metavar="txt|jsonl|parquet", help="What all files hold, whatever their names.")
    ] = None,
    strip_gutenberg: Annotated[bool, typer.Option(help="Remove Project Gutenberg headers and footers.")] = False,
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
    from fastdistil.data.prepare import PrepareOptions
    from fastdistil.data.prepare import prepare as run

    options = PrepareOptions(
        tokenizer=tokenizer,
        max_length=max_length,
        documents=documents,  # type: ignore[arg-type]
        text_field=text_field,
        read_as=read_as,  # type: ignore[arg-type]
        strip_gutenberg=strip_gutenberg,
        strip=strip,
        special_tokens=special_tokens,
        special_tokens_in_text=special_tokens_in_text,
        bos=bos,  # type: ignore[arg-type]
        min_tokens=min_tokens,
        max_unknown=max_unknown,
        max_unknown_share=max_unknown_share,
        max_bad_fraction=max_bad_fraction,
        shard_tokens=shard_tokens,
        workers=workers,
    )
    with PrepareBar() as bar:
        manifest = run(inputs, out, options, bar)
    print(
        f"{out}: {manifest.tokens:,} tokens in {manifest.sequences:,} sequences of {manifest.documents:,} documents"
        + (f"; {manifest.dropped:,} pieces dropped" if manifest.dropped else "")
        + (f"; {manifest.bad_records:,} bad records in {out / 'quarantine.jsonl'}" if manifest.bad_records else "")
        + (f"; {manifest.passed_over_files:,} hidden or backup files passed over" if manifest.passed_over_files else "")
        + (gutenberg_summary(manifest) if strip_gutenberg else "")
        + (
            f"; {manifest.special_spellings:,} special tokens spelt out in the text, {manifest.special_spellings_became}"
            if manifest.special_spellings
            else ""
        )
        + (f"; {manifest.unknown_share:.2%} of the tokens unknown" if manifest.unknown_share is not None else "")
    )


def gutenberg_summary(manifest: "Manifest") -> str:
    """Say how much of the text was Project Gutenberg's, and how many files have not the usual marks."""
    removed, total = manifest.gutenberg_removed, manifest.gutenberg_characters
    return (
        f"; Project Gutenberg's {removed:,} of {total:,} characters taken out ({removed / max(total, 1):.1%})"
        + (f"; no Gutenberg markers in {manifest.unmarked_files:,} files" if manifest.unmarked_files else "")
        + (f"; only half of the markers in {manifest.half_marked_files:,} files" if manifest.half_marked_files else "")
    )


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
    documents: Annotated[str, typer.Option(metavar="file|paragraph|line", help="What a document is in a .txt file.")] = "file",
    text_field: Annotated[str, typer.Option(help="Field of JSON and parquet that holds the text.")] = "text",
    read_as: Annotated[
        str | None, typer.Option("--as", metavar="txt|jsonl|parquet", help="What all files hold, whatever their names.")
    ] = None,
    strip_gutenberg: Annotated[bool, typer.Option(help="Remove Project Gutenberg headers and footers.")] = False,
    strip: Strip = None,
    special_tokens_in_text: SpecialTokensInText = False,
    max_unknown_share: MaxUnknownShare = 0.2,
    bos: EvaluateBos = "auto",
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch.")] = 8192,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda")] = "auto",
    precision: Annotated[str, typer.Option(metavar="auto|fp32|bf16|fp16")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Loss, perplexity and pseudo-perplexity of a model on text."""
    from fastdistil import evaluate as evaluation
    from fastdistil.errors import UserError

    if positions != "all" and not (positions.isdecimal() and len(positions) <= 15):
        raise UserError(f"--positions is a number or all, got {positions!r}")
    options = evaluation.EvaluateOptions(
        positions="all" if positions == "all" else int(positions),
        seed=seed,
        batch_tokens=batch_tokens,
        max_length=max_length,
        stride=stride,
        documents=documents,  # type: ignore[arg-type]
        text_field=text_field,
        read_as=read_as,  # type: ignore[arg-type]
        strip_gutenberg=strip_gutenberg,
        strip=strip,
        special_tokens_in_text=special_tokens_in_text,
        max_unknown_share=max_unknown_share,
        bos=bos,  # type: ignore[arg-type]
        device=device,
        precision=precision,
    )
    with EvaluateBar() as bar:
        report = evaluation.evaluate(model, corpora, options, bar)
    if json:
        print(report.to_json())
    else:
        _print_report(report)


@app.command(name="cache-teacher", epilog="Example: fastdistil cache-teacher distilbert data.train=corpus/ teacher.top_k=64")
def cache_teacher(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write, or to complete; default: one inside data.train.")
    ] = None,
) -> None:
    """Write the teacher's likeliest tokens for all that a recipe trains on, so that training needs no teacher."""
    from fastdistil.errors import translated
    from fastdistil.recipe import load_recipe
    from fastdistil.training.cache_teacher import cache_teacher as run

    with EvaluateBar("caching") as bar, translated("caching the teacher", out):
        written = run(load_recipe(recipe, overrides or ()), out, bar)
    print(
        f"{written.shards} shards of {written.epochs} epochs, {written.size / 2**20:,.0f} MiB ({written.made} made now); "
        f"train from it with teacher.cache={written.directory} objective.a_cos=0"
    )


def _print_report(report: "Report") -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"{report.model}: {report.architecture}, {report.parameters:,} parameters, {report.device}, {report.precision}. "
        "± is one standard error.",
        title_justify="left",
    )
    for column in ("corpus", "measure", "loss", "perplexity", "tokens"):
        table.add_column(column, justify="left" if column in ("corpus", "measure") else "right", overflow="fold")
    for corpus in report.corpora:
        if (heldout := corpus.heldout) is not None:
            table.add_row(corpus.corpus, "masked tokens", _loss(heldout), f"{heldout.perplexity:.2f}", f"{heldout.labels:,}")
        if (pseudo := corpus.pseudo) is not None:
            table.add_row(corpus.corpus, "pseudo-perplexity", _loss(pseudo), f"{pseudo.pppl:.2f}", f"{pseudo.positions:,}")
        if (causal := corpus.causal) is not None:
            measure = f"next token, behind {corpus.bos}" if corpus.bos is not None else "next token, no BOS"
            table.add_row(corpus.corpus, escape(measure), _loss(causal), f"{causal.perplexity:.2f}", f"{causal.tokens:,}")
    table.add_section()
    for corpus in report.corpora:
        table.add_row(corpus.corpus, "unknown tokens", "", "", f"{corpus.unknown_share:.2%}")
    rich.console.Console().print(table)
    for corpus in report.corpora:
        for note in corpus.notes:
            print(note)


def _loss(heldout: Any) -> str:
    return f"{heldout.loss:.4f} ± {heldout.loss_se:.4f}"


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

    from fastdistil.errors import UserError, printable, translated
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
def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
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
    from fastdistil.studies.scale import ScaleOptions, command

    command(
        ScaleOptions(
            recipe=recipe,
            overrides=overrides or (),
            np=np,
            hosts=hosts,
            mode=mode,
            rings=rings,
            compression=compression,
            sync=sync,
            steps=steps,
            rounds=rounds,
            ceiling=ceiling,
            on=on,
            baseline=baseline,
            predict=predict,
            network=network,
            table=table,
            points=points,
            out=out,
        )
    )


@app.command(epilog="Example: fastdistil profile distilbert data.train=corpus/ --steps 50")
def profile(
    recipe: RecipeName,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured updates, after a few of warm-up.")] = 30,
    np: Ranks = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
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
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
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
