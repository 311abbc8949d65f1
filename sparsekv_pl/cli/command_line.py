"""The command line of train.py and evaluate.py: LightningCLI with fewer commands and one-line errors."""

import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, cast

import yaml
from jsonargparse import Namespace, get_loader, set_loader
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sparsekv_pl.cli.config_values import check_shape, check_values, explained
from sparsekv_pl.cli.moved_classes import moved
from sparsekv_pl.cli.out_of_memory import out_of_memory_explained
from sparsekv_pl.cli.run_folders import REPORT, RunFolders
from sparsekv_pl.cli.run_length import fill_length
from sparsekv_pl.cli.run_name import add_name, fill_name
from sparsekv_pl.cli.trainer_limits import check_limits, counts_before_shares
from sparsekv_pl.cli.yaml_limits import check_depth, check_nodes
from sparsekv_pl.evaluation.pace import without_bars
from sparsekv_pl.evaluation.second_signal import second_stops_at_once
from sparsekv_pl.reporting.redaction import redact_output, redacted
from sparsekv_pl.storage.user_errors import user_message
from sparsekv_pl.training.precision import decide_settings

NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: |Errors:|Expected a <class 'NoneType'>|"
    r"Not a valid subclass of |Subclass types expect |a class path \(str\)|a dict with|"
    r"Given value type: |Given value: .*(Namespace\(|NestedArg\(| object at )|Given value: .{80}|"
    r"Expected a path but .* not accessible or invalid"
)
"""Lines of jsonargparse's errors about its attempts, not about the mistake."""

IN_LINE_NOISE = re.compile(
    r"Type .{1,300}? expects a function or a callable class: |[.:]? Got value: (Namespace\(.*|.{160,})"
)
"""The same inside lines; such a long value is a whole section, not the mistake in it."""

CHATTER = (
    ".*'set_vital' is deprecated",  # torchdata
    ".*isinstance\\(treespec, LeafSpec\\)",  # Lightning
    ".*`IterableDataset` has `__len__` defined",  # data/mixture.py gives every worker its own share
    ".*Precision (bf)?16-mixed is not supported by the model summary",
    ".*was called before the ``update`` method",  # text without questions, or questions without text
    ".*module\\(s\\) in eval mode at the start of training",  # a frozen backbone
    ".*args parameter is intended to run from within Python",  # the planner, a command of train.py, parses its own
    ".*does not have many workers",  # batches are made while the model computes; the default needs no workers
)
"""Warnings about internals of libraries."""

ADVERTISED = ("Tip: For seamless", "TPU available: False", "Automatic Mixed Precision (AMP)")
"""Lightning's messages about other products, absent hardware, and the precision, which a line of ours states."""

_load_yaml = get_loader("yaml")


def _load_yaml_and_none(text: str) -> Any:
    """Load YAML and check it. jsonargparse passes ``--model.backbone.adapter null`` on as the text "None"."""
    check_depth(text)
    value = _load_yaml(text)
    if isinstance(value, dict | list):
        check_nodes(text)
    check_shape(value)
    return None if value == "None" else value


set_loader("yaml", _load_yaml_and_none, exceptions=(yaml.YAMLError,))


class Parser(LightningArgumentParser):
    """A parser with one-line errors."""

    _reading = "the value"
    """The file that is being read, for errors."""

    def add_lightning_class_args(self, *args: Any, **settings: Any) -> list[str]:
        """Add a class's options; an option that takes a count or a share keeps the type given."""
        added = super().add_lightning_class_args(*args, **settings)
        counts_before_shares(self._actions)
        return added

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **settings: Any) -> Namespace:
        """A file's settings. Raises ``ValueError`` with the file's name if it cannot be read."""
        before, self._reading = self._reading, str(path)
        try:
            return super().parse_path(path, *args, **settings)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8 (byte {error.start}): give a YAML file") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        finally:
            self._reading = before

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message in one line and exit with code 2."""
        message = message.replace('"<unicode string>"', self._reading).replace(
            "Unexpected config: ", f"{self._reading} holds no settings: "
        )
        if self.exit_on_error and not os.environ.get("JSONARGPARSE_DEBUG"):
            self.exit(2, f"error: {moved(plain(message))}\n")
        super().error(message, ex)


class CommandLine(LightningCLI):
    """LightningCLI limited to ``commands``. class_path chooses model and data, so --help imports neither."""

    commands: Sequence[str] = ()
    reports: bool = False
    """Whether the script measures and writes reports, which ``--report`` can name."""
    progress: Callable[[], ProgressBar] | None = None
    """Makes the progress bar."""
    always: Sequence[type[Callback]] = ()
    """Callbacks of every run."""

    def __init__(self, **settings: Any) -> None:
        # The model makes its own optimizer, which Lightning's would silently replace.
        with RunFolders() as self.folders:
            super().__init__(parser_class=Parser, auto_configure_optimizers=False, **settings)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add Lightning's arguments and the run's name."""
        super().add_core_arguments_to_parser(parser)
        add_name(parser, self.reports)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, then check what types cannot express. Raises ``ValueError`` for a value that cannot work."""
        super().parse_arguments(parser, args)
        command = self.config.get(self.config.get("subcommand") or "", self.config)
        settings = command.as_dict()
        seed = settings.get("seed_everything")
        if seed is not None and not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise ValueError(f"seed_everything is {seed}: give 0 to {2**32 - 1}")
        if settings.get("weights_only") is False:
            raise ValueError("weights_only is false: that would run code that a checkpoint holds; leave it out")
        check_limits(settings["trainer"], str(self.config.get("subcommand")))
        trainer = {"class_path": "lightning.pytorch.Trainer", "init_args": settings["trainer"]}
        check_values({**settings, "trainer": trainer}, "")

    def _parse_ckpt_path(self) -> None:
        """Do nothing. Lightning's method takes settings from the checkpoint, including classes to instantiate."""

    def before_instantiate_classes(self) -> None:
        """Choose the precision if it was left out, for the saved configuration, and claim the output folders."""
        command, trains = self.config.get("subcommand") or "", not self.reports
        decide_settings(self.config.get(command, self.config), trains)
        if self.subcommand is not None:
            self.folders.claim_all(self.named(), trains)

    def named(self) -> Namespace:
        """The command's settings, with the folders that follow from the run's name."""
        settings = self.config.get(self.config.get("subcommand") or "", self.config).clone()
        fill_name(settings)
        return settings

    def instantiate_classes(self) -> None:
        """Make all objects. An error names the class that another package refused to make.

        What follows from the run's name and length is filled in; the saved configuration stays without it, so that a
        later ``--name`` changes all of it.
        """
        self.parser.add_instantiator(explained, object)
        settings = self.config.clone()
        command = settings.get(self.subcommand or "", settings)
        fill_name(command)
        fill_length(command)
        with self._memory_explained():
            self._make(settings, command)
        if self.subcommand is not None and self.reports:
            output = getattr(self.model, "output", None)  # a user's own module may write nothing
            if output is not None and not cast(Any, self.trainer).fast_dev_run:
                self.folders.claim("model.output", output, REPORT)

    def _make(self, settings: Namespace, command: Namespace) -> None:
        """Make all objects, the model last: what is wrong with the others is known before its weights are read.

        ``command`` is the part of ``settings`` that holds the command's.
        """
        model = Namespace(model=command.pop("model"))
        self.config_init = self.parser.instantiate(settings)
        self.datamodule = self._get(self.config_init, "data")
        self.trainer = self.instantiate_trainer()
        if self.subcommand is not None:
            model = Namespace({"subcommand": self.subcommand, self.subcommand: model})
        self.model = self._get(self.parser.instantiate(model, instantiate_groups=False), "model")
        self.config_init.get(self.subcommand or "", self.config_init)["model"] = self.model

    def instantiate_trainer(self, **settings: Any) -> Trainer:
        """Make the trainer. Lightning's refusal becomes a ``ValueError`` with the settings that it mentions."""
        try:
            return super().instantiate_trainer(callbacks=self._callbacks(), **settings)
        except (MisconfigurationException, RuntimeError, ValueError, TypeError, ImportError) as error:
            given = self._get(self.config, "trainer")
            named = {name: value for name, value in given.items() if re.search(rf"\b{name}\b", str(error))}
            values = "".join(f"; trainer.{name} is {_brief(value)}" for name, value in named.items())
            raise ValueError(f"trainer: {str(error).rstrip('.')}{values}") from error

    def _callbacks(self) -> list[Callback]:
        """The configuration's callbacks, ``always``, and ``progress`` unless the run has its own or disables it."""
        given = self._get(self.config_init, "trainer")
        callbacks = given.callbacks or []
        callbacks = [*(callbacks if isinstance(callbacks, list) else [callbacks]), *(made() for made in self.always)]
        shows = given.enable_progress_bar is not False and not given.barebones
        if shows and self.progress is not None and not any(isinstance(made, ProgressBar) for made in callbacks):
            return [*callbacks, self.progress()]
        return callbacks

    def _run_subcommand(self, subcommand: str) -> None:
        with self._memory_explained():
            super()._run_subcommand(subcommand)

    def _memory_explained(self) -> AbstractContextManager[None]:
        command = self.config.get("subcommand") or ""
        return out_of_memory_explained(self.config.get(command, self.config).as_dict(), training=command == "fit")

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        """The subcommands of LightningCLI that this script offers."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in cls.commands}


def run(command_line: Callable[[], Any]) -> None:
    """Run, and print an error that a user can fix as one line. JSONARGPARSE_DEBUG=true prints its traceback."""
    quieten()
    redact_output()
    try:
        with without_bars(), second_stops_at_once():
            command_line()
    except SIGTERMException as stopped:
        sys.exit(stopped.code or 128 + signal.SIGTERM)
    except Exception as error:
        line = user_message(error)
        if os.environ.get("JSONARGPARSE_DEBUG") or line is None:
            raise
        sys.exit(f"error: {plain(line)}")
    except (KeyboardInterrupt, SystemExit) as stopped:  # Lightning makes sys.exit(1) of Ctrl-C
        if not any(isinstance(error, KeyboardInterrupt) for error in (stopped, stopped.__context__)):
            raise
        sys.exit(128 + signal.SIGINT)


def quieten() -> None:
    """Silence libraries' messages about themselves that no user can act on."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # logs the address of each request, which may hold a key
    advertised = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advertised.addFilter(lambda record: not any(words in record.getMessage() for words in ADVERTISED))
    for message in CHATTER:
        warnings.filterwarnings("ignore", message=message)


def plain(message: str) -> str:
    """Shorten jsonargparse's many lines to one: ``key: error``.

    >>> plain('Parser key "model":\\n  Parser key "r":\\n    Errors:\\n      - Expected a <class \\'int\\'>')
    "model.r: Expected a <class 'int'>"
    """
    lines = [IN_LINE_NOISE.sub("", line.strip().removeprefix("- ")) for line in message.splitlines()]
    keys, errors = [], []
    for text in lines:
        while key := re.match(r'Parser key "(.+?)":\s*', text):
            keys.append(key[1])
            text = text[key.end() :]
        if text and not NOISE.match(text):
            errors.append(text)
    classes = [text for text in errors if text.startswith("Problem with given class_path")]
    if errors == classes:  # nothing else is left: a value where a class belongs
        errors += [text for text in lines if text.startswith("Not a valid subclass of ")][:1]
    errors = [text for text in dict.fromkeys(errors) if text not in classes[:-1]]
    return redacted(": ".join(filter(None, [".".join(dict.fromkeys(keys)), " ".join(errors or lines)])))


def _brief(value: Any) -> str:
    """A setting's value for messages; objects are shown as their class names."""
    if isinstance(value, list):
        return f"[{', '.join(map(_brief, value))}]"
    path = value.get("class_path") if isinstance(value, Namespace) else None
    return str(path).rpartition(".")[2] if path else repr(value)
