"""Commands as a person types them."""

from typing import Any

from typer.testing import CliRunner

from flows.cli.app import app


def invoke(*arguments: object, **options: Any) -> Any:
    """The command's result, whatever it is."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def ota(*arguments: object, **options: Any) -> Any:
    """The result of a command that ends well."""
    result = invoke(*arguments, **options)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def said(*arguments: object, **options: Any) -> str:
    """What a command that ends well prints."""
    return str(ota(*arguments, **options).stdout)


def refused(*arguments: object, **options: Any) -> str:
    """What is said of a user's mistake, on stderr alone: it ends with exit code 2 and without a traceback."""
    result = invoke(*arguments, **options)
    assert (result.exit_code, result.stdout) == (2, "") and "Traceback" not in result.stderr, (result.output, result.exception)
    return str(result.stderr)
