"""Command line of the converters.

python -m converters inspect SRC               what a checkpoint is
python -m converters import SRC DST            original -> model folder
python -m converters export SRC DST            model folder -> original file, or folder in the form of the hub

SRC of inspect and import: a file, the index (*.index.json) of several, a folder in the form of the hub, or a hub name
(owner/name or owner/name@revision; HF_TOKEN for private ones).

Example:  python -m converters import model.ckpt my-model && python -m converters export my-model back.ckpt
Cost:     seconds and twice the size of the file in memory, on a processor alone.
Exit:     0; 2 where an input is at fault, with one message on stderr.
"""

from __future__ import annotations

import argparse
import errno
import sys

import converters

_MOST = 2000  # characters of a message


def main(argv: list[str] | None = None) -> int:
    """Run one command; print one message and return 2 where the input is at fault."""
    args = _parser().parse_args(argv)
    try:
        if args.command == "inspect":
            _show(converters.inspect(args.src, config=args.config))
        elif args.command == "import":
            model, _, provenance, _ = converters.import_checkpoint(
                args.src, args.dst, config=args.config, allow_cast=args.allow_cast, overwrite=args.overwrite
            )
            print(f"{args.dst}: {model.family} {model.config}")
            if "hub" in provenance:
                print(f"from {provenance['hub']['repo']}, commit {provenance['hub']['commit']}")
            print(f"from {provenance['source']} ({provenance['sha256']}), licence {provenance['licence']}")
            for note in provenance["notes"]:
                print(f"note: {note}")
        else:
            notes = converters.export_checkpoint(args.src, args.dst, overwrite=args.overwrite)
            print(f"{args.dst}: written")
            for note in notes:
                print(f"note: {note}")
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:  # whatever a damaged file leads to: a traceback helps nobody who has one
        print(_message(args.src, error), file=sys.stderr)
        return 2
    return 0


def _message(src: str, error: Exception) -> str:
    """Say what went wrong, with the name of the file, in a text that can be read at once."""
    text = str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        text = f"no space left on the disk: {error.filename or error.strerror}; nothing was written"
    elif isinstance(error, OSError) and error.errno and error.filename:
        text = f"{error.filename}: {error.strerror}"
    elif not isinstance(error, ValueError | OSError):
        text = f"{src}: can't be read ({type(error).__name__}: {' '.join(text.split())})"
    if len(text) > _MOST:
        text = text[:_MOST].rpartition("\n")[0] or text[:_MOST]
        text += "\n..."
    return f"error: {text}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m converters", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("inspect", help="say what a checkpoint, model folder or hub name is")
    take = commands.add_parser("import", help="original checkpoint or hub name -> model folder")
    give = commands.add_parser(
        "export", help="model folder -> original checkpoint file, or (DST without suffix) hub folder"
    )
    for command in (look, take, give):
        command.add_argument("src", metavar="SRC")
    for command in (look, take):
        command.add_argument(
            "--config", help="JSON file with the original's hyper-parameters (default: config.json beside SRC)"
        )
    for command in (take, give):
        command.add_argument("dst", metavar="DST")
        command.add_argument(
            "--overwrite", action="store_true", help="replace DST where it is a model folder, or an earlier export"
        )
    take.add_argument("--allow-cast", action="store_true", help="round float64 and integer tensors to float32")
    return parser


def _show(facts: dict) -> None:
    for name, value in facts.items():
        if isinstance(value, dict) and value:
            print(f"{name}:")
            for key, entry in value.items():
                print(f"  {key}: {entry}")
        elif value not in ({}, [], ""):
            print(f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}")


if __name__ == "__main__":
    sys.exit(main())
