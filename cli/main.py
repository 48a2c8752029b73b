"""Reads the command line and runs one command. Nothing heavy is imported before the arguments are known to be right."""

import argparse
import keyword
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import __version__
from ..hub.leaks import KINDS
from ..support.errors import LoramuxError
from . import hub, serving

INTERRUPTED = 130
FAILED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; 2 after an error, which is told in one message on stderr; 130 after Ctrl-C.
    """
    parsed = build_parser().parse_args(arguments)
    try:
        if parsed.command in ("hub", "serve", "chat"):
            parsed.run(parsed)
            return 0
        from . import commands

        commands.quieten_libraries()
        name = f"{parsed.command}_" if keyword.iskeyword(parsed.command) else parsed.command
        getattr(commands, name)(parsed)
    except LoramuxError as error:
        print(f"loramux {parsed.command}: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"loramux {parsed.command}: {error.filename or 'error'}: {error.strerror or error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"\nstopped{_how_to_go_on(parsed)}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _how_to_go_on(parsed: argparse.Namespace) -> str:
    """The command that continues what Ctrl-C stopped, where there is one."""
    if parsed.command == "train" and parsed.to is not None and (parsed.to / "recipe.yaml").is_file():
        return f"; resume with: loramux train --resume --to {parsed.to}"
    return "; the same command goes on where it stopped" if parsed.command == "compare" else ""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loramux",
        description="Train MoE-style LoRA experts for many tasks on one frozen language model, see what each task\n"
        "gained, and take each task away as a plain PEFT LoRA.",
        epilog="`loramux COMMAND --help` tells more, with examples. Start with: loramux train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"loramux {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for add in (
        *(_add_train, _add_evaluate, _add_compare, _add_adapt, _add_export, _add_import),
        *(_add_routes, _add_methods, _add_tasks, _add_base),
        *(_add_publish, _add_pull, _add_search, _add_info, _add_diff, _add_recommend),
        *(_add_serve, _add_chat, _add_hub),
    ):
        add(commands)
    return parser


Commands = argparse._SubParsersAction


def _add_train(commands: Commands) -> None:
    parser = _command(
        commands,
        "train",
        "train a mixture, evaluate it, export its tasks",
        "Train a method on a mixture of tasks and a plain LoRA of equal size beside it, evaluate both, export every\n"
        "task as a plain LoRA, and write a table and pictures. Without a recipe it takes the base and the tasks that\n"
        "come with loramux, and a few minutes on two cores.",
        """
  loramux train
  loramux train my_recipe.yaml --to runs/first
  loramux train --set base.model=HuggingFaceTB/SmolLM2-135M --set tasks=my_tasks.yaml --set method.name=smora
  loramux train --resume --to runs/first
  torchrun --nproc-per-node 2 train.py my_recipe.yaml --to runs/two""",
    )
    _add_recipe(parser)
    parser.add_argument("--to", type=Path, metavar="RUN", help="the run folder (default: a new one, runs/METHOD)")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run, by its own recipe")


def _add_evaluate(commands: Commands) -> None:
    parser = _command(
        commands,
        "evaluate",
        "measure a finished run again",
        "Score the base, the matched LoRA, the routed model and the exports of a finished run, and write its table\n"
        "and pictures anew.",
        """
  loramux evaluate runs/moa
  loramux evaluate runs/moa --split validation --limit 100
  loramux evaluate runs/moa --report-only""",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--split", choices=("train", "validation", "test"), help="default: as the recipe says")
    parser.add_argument("--limit", type=_positive, metavar="N", help="examples per task (default: as the recipe says)")
    parser.add_argument("--batch-size", type=_positive, metavar="N", help="prompts per forward pass")
    parser.add_argument("--report-only", action="store_true", help="only draw the table and pictures anew")


def _add_compare(commands: Commands) -> None:
    parser = _command(
        commands,
        "compare",
        "several methods over one mixture",
        "Run several methods over one mixture and write one table. The plain LoRA of each method's size always comes\n"
        "along. Finished runs are kept: an interrupted comparison goes on, methods and seeds can be added later.",
        """
  loramux compare --methods multilora,smora,moa --to comparisons/first
  loramux compare my_recipe.yaml --methods smora,moa --seeds 0,1,2 --learning-rates 1e-3,3e-3 --to comparisons/three
  loramux compare --methods smora --method-option smora.rank=32 --to comparisons/small
  loramux compare --report-only --to comparisons/first""",
    )
    _add_recipe(parser)
    parser.add_argument("--to", type=Path, metavar="DIR", required=True, help="the folder of the comparison")
    parser.add_argument("--methods", type=_listed(str), metavar="A,B,...", help="see `loramux methods`")
    parser.add_argument("--seeds", type=_listed(int), default=[0], metavar="0,1,...", help="default: 0")
    parser.add_argument(
        "--learning-rates",
        type=_listed(float),
        default=[],
        metavar="R,S,...",
        help="tried for every method with the first seed; the best on validation is taken (default: the recipe's)",
    )
    parser.add_argument(
        "--method-option",
        action="append",
        default=[],
        metavar="METHOD.KEY=VALUE",
        help="an option of one method (may be repeated; the recipe's own method has the recipe's options)",
    )
    parser.add_argument("--report-only", action="store_true", help="only draw the table and pictures anew")


def _add_adapt(commands: Commands) -> None:
    parser = _command(
        commands,
        "adapt",
        "take a new task into a finished run",
        "Let a new task join a trained hub from a few examples, in every way the hub can take it in, and compare them\n"
        "with the base and a plain LoRA trained from scratch. The run itself stays as it is; ways that must not move\n"
        "its tasks prove that they do not. Each way leaves a run folder, and the task as a plain LoRA.",
        """
  loramux adapt runs/moa --task new.yaml --shots 16 --to adapted/new
  loramux adapt runs/mhr --task data/intent --shots 16 --ways row,mean_expert --to adapted/intent
  loramux adapt runs/mhr --task new.yaml --ways row --learning-rate row=0.05 --steps 500 --to adapted/slower
  loramux adapt runs/madx --task new.yaml --method-option languages=de --to adapted/german""",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder; nothing in it changes")
    parser.add_argument("--task", metavar="FILE", required=True, help="the new task: a task file, or a folder of data")
    parser.add_argument("--to", type=Path, metavar="DIR", required=True, help="a new folder")
    parser.add_argument("--shots", type=_positive, metavar="N", help="training examples it learns from (default: all)")
    parser.add_argument("--ways", type=_listed(str), metavar="A,B,...", help="default: all that the hub can do")
    parser.add_argument("--steps", type=_positive, default=200, metavar="N", help="of every way (default: 200)")
    parser.add_argument(
        "--learning-rate",
        action="append",
        default=[],
        metavar="[WAY=]R",
        help="of one way, or of all (may be repeated; default: a multiple of the run's that suits the way)",
    )
    parser.add_argument(
        "--method-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what an option of the method that is given task by task is for the new one (may be repeated)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws the examples, too (default: 0)")


def _add_export(commands: Commands) -> None:
    parser = _command(
        commands,
        "export",
        "take tasks away as plain LoRAs",
        "Write tasks of a finished run as plain PEFT LoRA folders, which need no loramux. Exact where the method's\n"
        "weights are constant over a task; fitted and measured where they are not, and refused above the bound.",
        """
  loramux export runs/moa --all --to adapters
  loramux export runs/smora --task who --task where --to adapters --allow-lossy
  loramux export runs/palora --blend who=0.3,where=0.7 --blend who=0.6,where=0.4 --to adapters
  loramux export runs/mine --all --to adapters --base-id HuggingFaceTB/SmolLM2-135M""",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--to", type=Path, metavar="DIR", required=True, help="each task goes to DIR/TASK")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--task", action="append", metavar="TASK", help="a task to export (may be repeated)")
    which.add_argument("--all", action="store_true", help="export every task")
    which.add_argument(
        "--blend",
        action="append",
        metavar="TASK=SHARE,...",
        help="a blend of tasks, its shares summing to one, to DIR/TASK-SHARE-... (may be repeated)",
    )
    parser.add_argument("--allow-lossy", action="store_true", help="also write exports that lose more than the bound")
    parser.add_argument("--max-kl", type=float, metavar="NATS", help="the bound: divergence per answer token (0.02)")
    parser.add_argument("--rank", type=_positive, metavar="R", help="rank of fitted exports (default: of all experts)")
    parser.add_argument("--base-id", metavar="OWNER/NAME", help="the public id of a base that was a local folder")


def _add_import(commands: Commands) -> None:
    parser = _command(
        commands,
        "import",
        "make PEFT LoRAs the experts of a mixture",
        "Put LoRAs that were trained elsewhere together as one mixture with an expert per task. Nothing is trained: a\n"
        "task that is named gets exactly its LoRA, unless the method chooses token by token. The result is a run\n"
        "folder to serve, evaluate and export, and its recipe trains what chooses between the experts.",
        """
  loramux import who=exports/who where=exports/where --to hubs/two
  loramux import sql=someone/sql-lora chat=adapters/chat --base HuggingFaceTB/SmolLM2-135M --to hubs/mixed
  loramux import who=exports/who where=exports/where --method arrow --method-option top_k=1 --to hubs/arrow
  loramux import who=a where=b --method router_retriever --tasks tasks.yaml --to hubs/by_prompt""",
    )
    parser.add_argument(
        "experts",
        nargs="+",
        type=_assignment,
        metavar="TASK=LORA",
        help="a task and its LoRA: a PEFT folder, or a Hub id such as owner/name or owner/name@revision",
    )
    parser.add_argument("--to", type=Path, metavar="DIR", required=True, help="a new folder")
    parser.add_argument("--method", default="moa", metavar="M", help="see `loramux methods` (default: moa)")
    parser.add_argument(
        "--method-option",
        action="append",
        type=_assignment,
        default=[],
        metavar="KEY=VALUE",
        help="an option of the method (may be repeated; the rank is that of the widest LoRA)",
    )
    parser.add_argument("--base", metavar="MODEL", help="a Hub id or a folder (default: the base that all LoRAs name)")
    parser.add_argument(
        "--tasks", metavar="FILE", help="a task file with these tasks, to evaluate, export and train on"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one more key of the recipe, such as base.also_called=[other/name] (may be repeated)",
    )


def _add_routes(commands: Commands) -> None:
    parser = _command(
        commands,
        "routes",
        "see what the routers of a run do",
        "Draw which expert each task uses at every layer, which tasks are routed alike, how many experts were in use\n"
        "while the run trained and how well its tasks' gradients agreed, and write a page of text whose tokens have\n"
        "the colours of their experts.",
        """
  loramux routes runs/smora
  loramux routes runs/smora --task who --task where --examples 10 --to who_and_where""",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--to", type=Path, metavar="DIR", help="where to write (default: RUN/routes)")
    parser.add_argument(
        "--task", action="append", metavar="TASK", help="a task to look at (may be repeated; default: all)"
    )
    parser.add_argument(
        "--examples", type=_positive, default=4, metavar="N", help="examples per task on the page of text (default: 4)"
    )


def _add_methods(commands: Commands) -> None:
    parser = _command(
        commands,
        "methods",
        "list the methods, or tell about one",
        "List the methods with what they route by, how they export, and how many parameters they train on a model.",
        """
  loramux methods
  loramux methods smora
  loramux methods --model HuggingFaceTB/SmolLM2-135M --rank 16 --tasks 8""",
    )
    parser.add_argument("method", nargs="?", metavar="METHOD", help="tell about this one and its options")
    parser.add_argument("--model", metavar="M", help="count parameters on this model (default: the one that ships)")
    parser.add_argument("--tasks", type=_positive, default=8, metavar="N", help="number of tasks (default: 8)")
    parser.add_argument("--rank", type=_positive, metavar="R", help="rank instead of each method's default")


def _add_tasks(commands: Commands) -> None:
    parser = _command(
        commands,
        "tasks",
        "show the tasks of a file",
        "Read a task file, a folder or the default mixture, and show sizes, metrics and an example of every task.",
        """
  loramux tasks
  loramux tasks my_tasks.yaml
  loramux tasks data/snips --examples 3""",
    )
    parser.add_argument("source", nargs="?", default="default", metavar="FILE", help="default: the tasks that ship")
    parser.add_argument("--examples", type=_positive, default=1, metavar="N", help="examples per task (default: 1)")


def _add_base(commands: Commands) -> None:
    parser = _command(
        commands,
        "base",
        "write the base that ships",
        "Write the small model that comes with loramux as an ordinary Hugging Face folder.",
        """
  loramux base --to tiny""",
    )
    parser.add_argument("--to", type=Path, metavar="DIR", required=True, help="a new folder")


def _add_publish(commands: Commands) -> None:
    parser = _command(
        commands,
        "publish",
        "put adapters on a hub",
        "Publish the exports of a run, its mixture with the router, its figures and pictures as one repository, with\n"
        "a card. One commit or none; what is there already is not sent again. Tokens, private keys, home folders and\n"
        "examples of the tasks' data are looked for first, and nothing is sent when there are any.",
        """
  loramux publish runs/moa mia/eight --licence apache-2.0 --dry-run
  loramux publish runs/moa mia/eight --licence apache-2.0
  loramux publish runs/moa mia/eight --split --private --revision trial
  loramux publish exports/who mia/who --endpoint http://127.0.0.1:8765 --sign key.pem""",
    )
    parser.add_argument("place", type=Path, metavar="RUN_OR_EXPORT", help="a run folder, exports, or one adapter")
    parser.add_argument("repository", metavar="OWNER/NAME", help="where to; it is made if it is not there")
    parser.add_argument("--split", action="store_true", help="one repository per task (OWNER/NAME-TASK), not a folder")
    parser.add_argument("--private", action="store_true", help="make it private")
    parser.add_argument("--revision", default="main", metavar="BRANCH", help="a branch (default: main)")
    parser.add_argument("--licence", metavar="L", help="as the Hub names it: apache-2.0, mit, cc-by-4.0, ...")
    parser.add_argument("--examples", type=_count, default=3, metavar="N", help="per task on the card (default: 3)")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=KINDS,
        help="publish such findings (may be repeated)",
    )
    parser.add_argument("--sign", type=Path, metavar="KEY", help="sign it with this Ed25519 key (PEM)")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be sent")
    _add_endpoint(parser)


def _add_pull(commands: Commands) -> None:
    parser = _command(
        commands,
        "pull",
        "fetch adapters from a hub, checked",
        "Fetch a repository of adapters. Pickles and code stay where they are. Every file is compared with the\n"
        "hub's hash of it, and names and shapes of all tensors with the base.",
        """
  loramux pull mia/eight
  loramux pull mia/eight@trial --to adapters/eight
  loramux pull mia/eight --to adapters/eight --trust mia.pub
  loramux pull mia/eight --base models/my_copy --force-base""",
    )
    parser.add_argument("repository", metavar="OWNER/NAME[@REVISION]", help="a branch, a tag or a commit after @")
    parser.add_argument("--to", type=Path, metavar="DIR", help="a folder (default: only the cache)")
    parser.add_argument("--base", metavar="MODEL", help="the base it is for (default: the one it names)")
    parser.add_argument("--force-base", action="store_true", help="take it though it names another base or revision")
    parser.add_argument("--trust", type=Path, metavar="KEYS", help="refuse what none of these public keys (PEM) signed")
    _add_endpoint(parser)


def _add_search(commands: Commands) -> None:
    parser = _command(
        commands,
        "search",
        "find adapters on a hub",
        "List repositories of PEFT adapters, the most downloaded first.",
        """
  loramux search
  loramux search plural --base loramux/tiny --method moa
  loramux search --owner mia --limit 50""",
    )
    parser.add_argument("text", nargs="?", metavar="TEXT", help="part of a repository's name")
    parser.add_argument("--base", metavar="MODEL", help="only adapters of this base")
    parser.add_argument("--method", metavar="M", help="only those that loramux trained with this method")
    parser.add_argument("--owner", metavar="OWNER", help="only those of this user or organisation")
    parser.add_argument("--limit", type=_positive, default=20, metavar="N", help="at most so many (default: 20)")
    _add_endpoint(parser)


def _add_info(commands: Commands) -> None:
    parser = _command(
        commands,
        "info",
        "what a repository of adapters holds",
        "Tell of a published repository: base, method, licence, adapters with ranks, targets and scores.",
        """
  loramux info mia/eight
  loramux info mia/eight@trial""",
    )
    parser.add_argument("repository", metavar="OWNER/NAME[@REVISION]")
    _add_endpoint(parser)


def _add_diff(commands: Commands) -> None:
    parser = _command(
        commands,
        "diff",
        "compare two adapters",
        "Compare the adapters of two places: configuration, ranks, targets, scores, and how far their updates of each\n"
        "layer are apart.",
        """
  loramux diff mia/eight mia/eight@trial
  loramux diff exports/who mia/who""",
    )
    parser.add_argument("first", metavar="A", help="a folder, or OWNER/NAME[@REVISION]")
    parser.add_argument("second", metavar="B", help="the same")
    _add_endpoint(parser)


def _add_recommend(commands: Commands) -> None:
    parser = _command(
        commands,
        "recommend",
        "which adapters promise most for a task",
        "Order published adapters by what they promise for a task: how well each predicts a few of its answers, how\n"
        "alike its prompts are to theirs, and what was measured on the same data set. Resampling the examples tells\n"
        "how sure the order is.",
        """
  loramux recommend --task mine.yaml --from runs/moa
  loramux recommend --task mine.yaml --from mia/eight --from tom/numbers --trial-steps 8
  loramux recommend --task mine.yaml --base HuggingFaceTB/SmolLM2-135M --from intent""",
    )
    parser.add_argument("--task", metavar="FILE", required=True, help="a task file with one task, or a folder of data")
    parser.add_argument(
        "--from",
        dest="sources",
        action="append",
        default=[],
        metavar="WHERE",
        help="a folder, OWNER/NAME, or words to search for (may be repeated; default: all adapters of the base)",
    )
    parser.add_argument("--base", metavar="MODEL", help="the base (default: the one that the adapters name)")
    parser.add_argument("--shots", type=_positive, default=32, metavar="N", help="examples to look at (default: 32)")
    parser.add_argument(
        "--trial-steps",
        type=_count,
        default=0,
        metavar="N",
        help="judge each adapter by half of the examples after N steps of training on the other half (8 finds the\n"
        "best more often; default: 0, as it is)",
    )
    parser.add_argument("--limit", type=_positive, default=20, metavar="N", help="of each search (default: 20)")
    _add_endpoint(parser)


def _add_endpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", metavar="URL", help="the hub (default: HF_ENDPOINT, else huggingface.co)")


def _add_serve(commands: Commands) -> None:
    parser = _command(
        commands,
        "serve",
        "serve a base with many adapters",
        "Serve one base, any number of adapters and routed mixtures behind OpenAI's API, with a live page. Adapters\n"
        "come and go while it runs; model `auto` lets the router pick one for every prompt. Ctrl-C finishes what it\n"
        "began.",
        """
  loramux serve runs/first
  loramux serve --base HuggingFaceTB/SmolLM2-135M --adapters adapters/ --port 8080
  loramux serve runs/first --host 0.0.0.0 --set api_keys_file=keys.txt --set limits.queue=64""",
    )
    serving.add_serve(parser)


def _add_chat(commands: Commands) -> None:
    parser = _command(
        commands,
        "chat",
        "talk to a server",
        "Talk to a server in the terminal, and see which adapter answers.",
        """
  loramux chat
  loramux chat http://127.0.0.1:8080 --model who
  echo 'Mia hid the red cup in the garden.' | loramux chat""",
    )
    serving.add_chat(parser)


def _add_hub(commands: Commands) -> None:
    parser = _command(
        commands,
        "hub",
        "a hub of your own",
        "Serve a hub that unchanged Hugging Face clients publish to and pull from, on one machine, in one process and\n"
        "one folder; give it tokens and organisations; copy everything from one hub to another.",
        """
  loramux hub serve
  loramux hub token create mia
  loramux hub serve --host 0.0.0.0 --root /srv/hub
  loramux hub mirror http://127.0.0.1:8765 https://huggingface.co --author mia""",
    )
    hub.add_parsers(parser.add_subparsers(metavar="COMMAND", required=True))


def _command(commands: Commands, name: str, help_: str, description: str, examples: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=help_,
        description=description,
        epilog=f"examples:{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", type=Path, metavar="RECIPE", help="a YAML file (default: what ships)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one key of the recipe, such as train.steps=200 (may be repeated)",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _assignment(text: str) -> str:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return text


def _listed(kind: type) -> Callable[[str], list]:
    def parse(text: str) -> list:
        try:
            return [kind(part.strip()) for part in text.split(",") if part.strip()]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {kind.__name__} like 1,2,3") from None

    return parse
