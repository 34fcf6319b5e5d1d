"""The command line `asr-kd`. Each verb parses, calls one function and prints; torch is imported only if a verb needs it."""

from __future__ import annotations

import argparse
import difflib
import getpass
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from asr_kd.config.base import Settings, group_of
from asr_kd.config.load import build, load_yaml, override
from asr_kd.config.verbs import VERBS, Verb, name_of
from asr_kd.decoding.settings import TranscribeSettings
from asr_kd.ending import Status, Stopped, interruptible
from asr_kd.errors import UserError
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.summary import check_file, summarised, tell_summary
from asr_kd.version import version

S = TypeVar("S", bound=Settings)
#: endings of settings files; whatever else is named without a key was meant as a value
SETTINGS_FILES = (".yaml", ".yml", ".json", "")


def _settings(kind: type[S], words: list[str]) -> S:
    """Settings from `[FILE.yaml] [key=value …]`."""
    files = [word for word in words if "=" not in word or os.path.isfile(word)]
    for file in files:
        if os.path.splitext(file)[1].lower() not in SETTINGS_FILES:
            raise UserError(f"{file}: is no settings file, whose name ends in .yaml; {_hint(kind, file)}")
    if len(files) > 1:
        raise UserError(f"{files[1]}: one settings file at most, then key=value")
    values = _values(kind, files[0]) if files else {}
    assignments = [word for word in words if word not in files]
    return build(kind, override(values, assignments), files[0] if files else "command line", assignments)


def _values(kind: type[Settings], file: str) -> dict[str, Any]:
    """What a settings file holds; a UserError says how it is given where it is an input of the verb, as its name suggests."""
    try:
        return load_yaml(file, as_typed=True)
    except UserError as error:
        if os.path.splitext(file)[1]:
            raise
        raise UserError(f"{error}; {_hint(kind, file)}") from None


def _hint(kind: type[Settings], file: str) -> str:
    """How a file or folder is given as the main input of the verb with these settings."""
    return f"to give it as an input, write {VERBS[name_of(kind)].main or 'KEY'}={file}"


def _dashed(parser: argparse.ArgumentParser, verb: Verb, option: str, arguments: list[str]) -> NoReturn:
    """Refuse an option that is none, and say how it is written where a setting has its name."""
    key, _, value = option.lstrip("-").partition("=")
    key, right = key.replace("-", "_"), ""
    if verb.settings and key.partition(".")[0] in verb.kind().model_fields:
        following = [*arguments[arguments.index(option) + 1 :], "VALUE"][0]
        value = value or ("VALUE" if following.startswith("-") else following)
        right = f"; settings have no dashes: write {key}={value}"
    _refuse(f"{parser.prog} {verb.name}", f"unknown option {option}{right}")


def _do(verb: Verb, words: list[str], **options: Any) -> int:
    """Run a verb with the settings in its words; those in `PARTICULAR` have functions of their own."""
    for key, word, value in zip(words, words[1:], [*words[2:], "VALUE"], strict=False):
        if word.startswith("=") and "=" not in key and os.path.splitext(key)[1].lower() not in SETTINGS_FILES[:-1]:
            raise UserError(f"command line: write {key}={word[1:] or value}, without spaces around =")
    if verb.name in PARTICULAR:
        return PARTICULAR[verb.name](words, **options) or Status.DONE
    return Status.DOES_NOT_HOLD if verb.do(_settings(verb.kind(), words)) is False else Status.DONE


def _eval(words: list[str], compare: list[str] | None, fail_if: str | None) -> int:
    from asr_kd.evaluation.gate import parse_gate

    gate = None if fail_if is None else parse_gate(fail_if)
    if compare is not None:
        if words:
            raise UserError(
                f"command line: {words[0]}: --compare takes earlier reports, no settings; give one or the other"
            )
        from asr_kd.evaluation.compare import compare as compare_reports

        failed = compare_reports(compare, gate)
    else:
        settings = _settings(EvalSettings, words)
        if gate:
            gate.check_names(settings.systems)
        from asr_kd.evaluation.job import evaluate

        report = evaluate(settings)
        failed = gate is not None and gate.judge(report.model_dump(mode="json"))
    return Status.DOES_NOT_HOLD if failed else Status.DONE


def _transcribe(words: list[str], stream: bool) -> None:
    words = [*words, *(["stream=true"] if stream else [])]
    audio = [word for word in words if not word.endswith((".yaml", ".yml"))]
    files = [word for word in audio if "=" not in word or os.path.isfile(word)]
    settings = _settings(TranscribeSettings, [word for word in words if word not in files])
    if bool(files) == bool(settings.audio):
        raise UserError("command line: give audio files, or audio=SHARDS output=TEXTS.jsonl; one of the two")
    if settings.stream and len(files) > 1:
        raise UserError("command line: --stream hears one source; give a file, - or microphone")
    if "-" in files and not settings.stream:
        raise UserError("command line: standard input (-) is heard with --stream")
    from asr_kd.decoding.transcribe import transcribe_files, transcribe_shards, transcribe_stream

    if settings.stream:
        transcribe_stream(settings, files[0])
    elif files:
        transcribe_files(settings, files)
    else:
        transcribe_shards(settings)


def _run(words: list[str], dry_run: bool, copy: bool) -> None:
    from asr_kd.pipeline import run_pipeline, wanted_variables
    from asr_kd.recipes import copied

    if not words or "=" in words[0] or len([word for word in words if "=" not in word]) != 1:
        raise UserError(
            "command line: give one pipeline, a recipe's name or a folder or file, e.g. asr-kd run digits [name=value …] [--dry-run]"
        )
    if not copy:
        run_pipeline(words[0], words[1:], dry_run)
        return
    if len(words) > 1 or dry_run:
        raise UserError("command line: --copy takes the name of a recipe, and nothing else")
    folder = copied(words[0])
    tell_summary(figures={"copy": str(folder)})
    wanted = wanted_variables(folder / "pipeline.yaml")
    giving = "".join(f" {name}=…" for name in wanted)
    more = "; README.md there says what it needs" if not wanted and (folder / "README.md").exists() else ""
    print(f"{folder}: a copy of the recipe, to be changed; asr-kd run {folder}{giving} runs it{more}")


#: verbs that take more from the command line than settings
PARTICULAR: dict[str, Callable[..., int | None]] = {"eval": _eval, "transcribe": _transcribe, "run": _run}

#: what follows a verb other than settings: how it is written, how often, and its help
WORDS = {
    "run": (
        "PIPELINE [name=value …]",
        "+",
        "a recipe that comes with asr-kd, such as digits, or a folder with a pipeline.yaml; and overrides of its variables",
    ),
    "transcribe": ("checkpoint=FOLDER FILE …", "+", "settings and audio files"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "run": {
        "--dry-run": {"action": "store_true", "help": "print what would run"},
        "--copy": {
            "action": "store_true",
            "help": "copy the recipe's folder, its scripts included, to pipelines/ below the working folder; nothing runs",
        },
    },
    "transcribe": {
        "--stream": {
            "action": "store_true",
            "help": "words as sound arrives from a FILE, - (standard input) or microphone",
        },
    },
    "eval": {
        "--compare": {"nargs": "+", "metavar": "REPORT", "help": "print earlier reports side by side instead"},
        "--fail-if": {
            "metavar": "CONDITION",
            "help": 'exit with status 1 when true, e.g. "student.wer > teacher.wer * 1.1"; names and keys of report.json; a WER of 3 %% is 0.03',
        },
    },
}


def _summary_file(word: str) -> str:
    """The file of `--summary`, in the words of argparse when it was meant as something else."""
    try:
        check_file(word)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return word


#: options of every verb
OF_ALL: dict[str, dict[str, Any]] = {
    "--summary": {
        "metavar": "FILE",
        "type": _summary_file,
        "help": "write how the command ended and what it did as JSON, also when it fails; -: to standard output",
    },
}

#: how to write settings, shown above the list of them
TYPING = (
    "A text is taken as it is typed, also 0012, on and null; an optional one is left out by an empty value (lm=), anything else by null. "
    "Numbers, lists [a, b] and groups {a: 1} are YAML. ~ in front of a path is the home folder.\n"
)


def _keys(kind: type[Settings], indent: str = "  ", told: set[type[Settings]] | None = None) -> list[str]:
    """A line for each setting, with those of a group below it, the first time that the group is met."""
    lines, told = [], set() if told is None else told
    for name, field in kind.model_fields.items():
        group = group_of(field.annotation)
        value = field.get_default(call_default_factory=True)
        default = "a group" if isinstance(value, Settings) else f"default {value!r}"
        what = field.description or (" ".join((group.__doc__ or "").split()).rstrip(".") if group else None)
        again = f"; {', '.join(group.model_fields)} as above" if group in told and group else ""
        lines.append(f"{indent}{name}: {what} ({'required' if field.is_required() else default}{again})")
        if group and not again:
            told.add(group)
            lines += _keys(group, indent + "    ", told)
    return lines


class Refused(SystemExit):
    """The words of a command are none that it takes.

    Attributes:
        verb: whose words they are; None where it is not known.
        message: what is wrong, as a sentence.
    """

    def __init__(self, verb: str | None, message: str) -> None:
        super().__init__(int(Status.MISTAKE))
        self.verb, self.message = verb, message


def _refuse(name: str, message: str) -> NoReturn:
    """Answer a mistake with one line; `name` is the program, or the program and the verb."""
    message = f"{message}{'' if message.endswith('?') else ';'} see {name} --help"
    print(f"{name}: {message}", file=sys.stderr)
    raise Refused(name.partition(" ")[2] or None, message)


class _Parser(argparse.ArgumentParser):
    """A parser that answers a mistake with one line, not with its usage."""

    def error(self, message: str) -> NoReturn:
        _refuse(self.prog, message)


def _summary_of(words: list[str]) -> str | None:
    """The file of `--summary` in words that were refused; None where there is none that may be written."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--summary", nargs="?", type=_summary_file)
    try:
        return parser.parse_known_args(words)[0].summary
    except argparse.ArgumentError:
        return None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="asr-kd",
        description="Distil a large acoustic model into a small streaming one.",
        epilog="asr-kd VERB --help lists the settings of a verb. Settings come from a YAML file, key=value overrides them.",
    )
    parser.add_argument("--version", action="version", version=f"asr-kd {version()}", help="print the version")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, one in VERBS.items():
        if not one.help:  # only a stage of pipelines
            continue
        verb = verbs.add_parser(
            name, help=one.help, description=one.help, formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="\n".join([TYPING, "settings:", *_keys(one.kind())]) if one.settings else None,
        )  # fmt: skip
        words, count, what = WORDS.get(name, ("[FILE.yaml] [key=value …]", "*", "settings"))
        verb.add_argument("words", nargs=count, metavar=words, help=what)
        options = {**OPTIONS.get(name, {}), **OF_ALL}
        for option, meaning in options.items():
            verb.add_argument(option, **meaning)
        # of words that may come often argparse's own repeats how they are written
        values = {
            option: f" {one.get('metavar', '')}".rstrip() + " …" * ("nargs" in one) for option, one in options.items()
        }
        verb.usage = " ".join(["%(prog)s", *(f"[{option}{value}]" for option, value in values.items()), words])
    return parser


def _name_user() -> None:
    """See to it that the user has a name, for torch asks for it to train, and in a container a user may be a number alone."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        os.environ["USER"] = str(os.getuid())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, see `Status`. Defects of the program are raised."""
    # characters that the terminal or pipe cannot encode are escaped, as on stderr
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # threads that `one_thread` would leave idle are not started at all, here and in the processes of a job
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _name_user()
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    try:
        shown = [name for name, verb in VERBS.items() if verb.help]
        if arguments and arguments[0] not in shown and (near := difflib.get_close_matches(arguments[0], shown, n=1)):
            _refuse(parser.prog, f"unknown verb {arguments[0]}; did you mean {near[0]}?")
        parsed, rest = parser.parse_known_args(arguments)  # the rest: words that follow an option
        if unknown := [word for word in rest if word.startswith("-") and word != "-"]:
            _dashed(parser, VERBS[parsed.verb], unknown[0], arguments)
    except Refused as refused:
        with summarised(refused.verb, _summary_of(arguments)) as ending:
            ending.status, ending.message = Status.MISTAKE, refused.message
        raise
    options = {name: value for name, value in vars(parsed).items() if name not in ("verb", "words", "summary")}
    with summarised(parsed.verb, parsed.summary) as ending, interruptible() as stopped:
        try:
            ending.status = _do(VERBS[parsed.verb], [*parsed.words, *rest], **options)
        except UserError as error:
            ending.status = error.status if isinstance(error, Stopped) else Status.MISTAKE
            ending.message = str(error)
        except KeyboardInterrupt:
            ending.status, ending.message = stopped(), "interrupted; the same command goes on where it stopped"
        except BrokenPipeError:
            ending.status = Status.NOBODY_READS
        except OSError as error:
            if error.filename is None and error.errno is None:
                raise
            ending.status = Status.MISTAKE
            ending.message = f"{error.filename or 'input or output'}: {error.strerror or error}"
        if ending.message:
            print(f"asr-kd {parsed.verb}: {ending.message}", file=sys.stderr)
    return ending.status


def command() -> NoReturn:
    """`asr-kd` as a program: a defect has its own exit status, other than that of a `verify` that does not hold."""
    try:
        status = int(main())
    except Exception:
        traceback.print_exc()
        status = Status.DEFECT
    sys.exit(status)


if __name__ == "__main__":
    command()
